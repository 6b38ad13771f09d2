// Messages and tools as the JSON that chat templates are written for (OpenAI's shapes). Arguments and
// parameter schemas arrive as JSON text and become objects, because templates apply `tojson` to them. Pure.
#include "coordinator/service_internal.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

// An object from text a client wrote. NULL with a sentence.
static json_t *parse_object(const char *text, const char *field, struct error *error)
{
    json_error_t why;
    json_t *value = json_loads(text, JSON_REJECT_DUPLICATES, &why);
    if (value && json_is_object(value))
        return value;
    if (value)
        error_set(error, STATUS_INVALID, "%s is JSON, but not an object", field);
    else
        error_set(error, STATUS_INVALID, "%s is not JSON: %.200s (line %d, column %d)", field, why.text,
                  why.line, why.column);
    json_decref(value);
    return NULL;
}

static json_t *tool_call(const struct wire_tool_call *call, struct error *error)
{
    json_t *arguments = parse_object(call->arguments_json[0] ? call->arguments_json : "{}",
                                     "arguments_json of a tool call", error);
    if (!arguments)
        return NULL;
    json_t *result = json_pack("{s:s, s:{s:s, s:o}}", "type", "function", "function", "name", call->name,
                               "arguments", arguments);
    if (result && call->id[0] != '\0')
        json_object_set_new(result, "id", json_string(call->id));
    return result;
}

static json_t *message(const struct wire_message *from, struct error *error)
{
    if (from->role[0] == '\0') {
        error_set(error, STATUS_INVALID, "a message has no role");
        return NULL;
    }
    json_t *to = json_pack("{s:s, s:s}", "role", from->role, "content", from->content);
    if (to && from->name[0] != '\0')
        json_object_set_new(to, "name", json_string(from->name));
    if (to && from->tool_call_id[0] != '\0')
        json_object_set_new(to, "tool_call_id", json_string(from->tool_call_id));
    if (!to || from->n_tool_calls == 0)
        return to;
    json_t *calls = json_array();
    json_object_set_new(to, "tool_calls", calls);
    for (uint32_t i = 0; i < from->n_tool_calls; i++) {
        json_t *call = tool_call(&from->tool_calls[i], error);
        if (!call || json_array_append_new(calls, call)) {
            json_decref(to);
            return NULL;
        }
    }
    return to;
}

static json_t *tool(const struct wire_tool *from, struct error *error)
{
    json_t *parameters = parse_object(from->parameters_json[0] ? from->parameters_json : "{}",
                                      "parameters_json of a tool", error);
    if (!parameters)
        return NULL;
    return json_pack("{s:s, s:{s:s, s:s, s:o}}", "type", "function", "function", "name", from->name,
                     "description", from->description, "parameters", parameters);
}

static json_t *all_messages(const struct wire_messages *from, struct error *error)
{
    json_t *list = json_array();
    for (uint32_t i = 0; list && i < from->n_messages; i++) {
        json_t *one = message(&from->messages[i], error);
        if (one && !json_array_append_new(list, one))
            continue;
        json_decref(list);
        return NULL;
    }
    return list;
}

static json_t *all_tools(const struct wire_messages *from, struct error *error)
{
    if (from->n_tools == 0)
        return json_null();
    json_t *list = json_array();
    for (uint32_t i = 0; list && i < from->n_tools; i++) {
        json_t *one = tool(&from->tools[i], error);
        if (one && !json_array_append_new(list, one))
            continue;
        json_decref(list);
        return NULL;
    }
    return list;
}

char *service_chat_json(const struct wire_messages *from, struct error *error)
{
    struct error why = {0};
    char *text = NULL;
    json_t *arguments = NULL, *tools = NULL, *messages = all_messages(from, &why);
    if (messages)
        tools = all_tools(from, &why);
    if (tools)
        arguments = parse_object(from->template_arguments_json[0] ? from->template_arguments_json : "{}",
                                 "template_arguments_json", &why);
    if (arguments) {
        json_t *request =
            json_pack("{s:O, s:O, s:b, s:O}", "messages", messages, "tools", tools, "add_generation_prompt",
                      !from->no_generation_prompt, "arguments", arguments);
        text = request ? json_dumps(request, JSON_COMPACT) : NULL;
        json_decref(request);
    }
    json_decref(messages);
    json_decref(tools);
    json_decref(arguments);
    if (!text && error)
        *error = why;
    if (!text && !why.status)
        error_set(error, STATUS_NO_MEMORY, "the server is out of memory");
    return text;
}
