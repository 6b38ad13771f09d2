// Chat messages and tools, which Generate and Tokenize share.
#include "proto/wire_internal.h"
#include "strata/v1/inference.pb-c.h"

// --- encoding

static bool put_tool_calls(struct wire_encoder *e, Strata__V1__Message *to, const struct wire_message *from)
{
    Strata__V1__ToolCall *calls = wire_scratch(e, from->n_tool_calls, sizeof(*calls));
    to->tool_calls = wire_scratch(e, from->n_tool_calls, sizeof(*to->tool_calls));
    if (!calls || !to->tool_calls)
        return false;
    to->n_tool_calls = from->n_tool_calls;
    for (uint32_t i = 0; i < from->n_tool_calls; i++) {
        strata__v1__tool_call__init(&calls[i]);
        calls[i].id = wire_put_cstr(e, from->tool_calls[i].id);
        calls[i].name = wire_put_cstr(e, from->tool_calls[i].name);
        calls[i].arguments_json = wire_put_cstr(e, from->tool_calls[i].arguments_json);
        to->tool_calls[i] = &calls[i];
    }
    return true;
}

static bool put_turns(struct wire_encoder *e, Strata__V1__Messages *to, const struct wire_messages *from)
{
    Strata__V1__Message *turns = wire_scratch(e, from->n_messages, sizeof(*turns));
    to->messages = wire_scratch(e, from->n_messages, sizeof(*to->messages));
    if (!turns || !to->messages)
        return false;
    to->n_messages = from->n_messages;
    for (uint32_t i = 0; i < from->n_messages; i++) {
        const struct wire_message *turn = &from->messages[i];
        strata__v1__message__init(&turns[i]);
        turns[i].role = wire_put_cstr(e, turn->role);
        turns[i].content = wire_put_cstr(e, turn->content);
        turns[i].name = wire_put_cstr(e, turn->name);
        turns[i].tool_call_id = wire_put_cstr(e, turn->tool_call_id);
        if (turn->n_tool_calls && !put_tool_calls(e, &turns[i], turn))
            return false;
        to->messages[i] = &turns[i];
    }
    return true;
}

static bool put_tools(struct wire_encoder *e, Strata__V1__Messages *to, const struct wire_messages *from)
{
    Strata__V1__Tool *tools = wire_scratch(e, from->n_tools, sizeof(*tools));
    to->tools = wire_scratch(e, from->n_tools, sizeof(*to->tools));
    if (!tools || !to->tools)
        return false;
    to->n_tools = from->n_tools;
    for (uint32_t i = 0; i < from->n_tools; i++) {
        strata__v1__tool__init(&tools[i]);
        tools[i].name = wire_put_cstr(e, from->tools[i].name);
        tools[i].description = wire_put_cstr(e, from->tools[i].description);
        tools[i].parameters_json = wire_put_cstr(e, from->tools[i].parameters_json);
        to->tools[i] = &tools[i];
    }
    return true;
}

struct Strata__V1__Messages *wire_put_messages(struct wire_encoder *e, const struct wire_messages *from)
{
    Strata__V1__Messages *to = wire_scratch(e, 1, sizeof(*to));
    if (!to)
        return NULL;
    strata__v1__messages__init(to);
    to->no_generation_prompt = from->no_generation_prompt;
    to->template_arguments_json = wire_put_cstr(e, from->template_arguments_json);
    return put_turns(e, to, from) && put_tools(e, to, from) ? to : NULL;
}

// --- decoding

static void take_turn(struct wire_decoder *d, struct wire_message *out, const Strata__V1__Message *from)
{
    out->role = wire_take_cstr(d, from->role, "role");
    out->content = wire_take_cstr(d, from->content, "content");
    out->name = wire_take_cstr(d, from->name, "name");
    out->tool_call_id = wire_take_cstr(d, from->tool_call_id, "tool_call_id");
    uint32_t count = wire_take_count(d, from->n_tool_calls, MAX_TOOL_CALLS, "tool calls of a message");
    struct wire_tool_call *calls = wire_make(d, count, sizeof(*calls));
    for (uint32_t i = 0; calls && i < count; i++) {
        calls[i].id = wire_take_cstr(d, from->tool_calls[i]->id, "tool_calls.id");
        calls[i].name = wire_take_cstr(d, from->tool_calls[i]->name, "tool_calls.name");
        calls[i].arguments_json =
            wire_take_cstr(d, from->tool_calls[i]->arguments_json, "tool_calls.arguments_json");
    }
    out->tool_calls = calls;
    out->n_tool_calls = count;
}

void wire_take_messages(struct wire_decoder *d, struct wire_messages *out,
                        const struct Strata__V1__Messages *from)
{
    *out = (struct wire_messages){.no_generation_prompt = from->no_generation_prompt};
    out->template_arguments_json =
        wire_take_cstr(d, from->template_arguments_json, "template_arguments_json");
    uint32_t n_messages = wire_take_count(d, from->n_messages, MAX_CHAT_MESSAGES, "messages");
    struct wire_message *messages = wire_make(d, n_messages, sizeof(*messages));
    for (uint32_t i = 0; messages && i < n_messages; i++)
        take_turn(d, &messages[i], from->messages[i]);
    uint32_t n_tools = wire_take_count(d, from->n_tools, MAX_CHAT_TOOLS, "tools");
    struct wire_tool *tools = wire_make(d, n_tools, sizeof(*tools));
    for (uint32_t i = 0; tools && i < n_tools; i++) {
        tools[i].name = wire_take_cstr(d, from->tools[i]->name, "tools.name");
        tools[i].description = wire_take_cstr(d, from->tools[i]->description, "tools.description");
        tools[i].parameters_json =
            wire_take_cstr(d, from->tools[i]->parameters_json, "tools.parameters_json");
    }
    out->messages = messages;
    out->n_messages = n_messages;
    out->tools = tools;
    out->n_tools = n_tools;
}
