// `strata chat`: a conversation on the terminal. The whole history goes with every turn; the server renders
// the model's chat template. Ctrl-C ends the answer being given, at the prompt it ends the program.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/cli_client.h"
#include "cli/cli_internal.h"

static const struct option OPTIONS[] = {
    CLIENT_OPTIONS,
    {"system", 0, OPTION_STRING, "TEXT", NULL, "The system message.", 0, 0},
    SAMPLING_OPTIONS,
    {0},
};

static const char USAGE[] = "strata chat [options]";
static const char ABOUT[] =
    "Talks to a running server. One line is one message; a line that ends in \\ goes on in the next.\n"
    "/clear forgets the conversation, /system TEXT sets the system message, /exit or Ctrl-D ends.";

struct conversation {
    struct wire_message *messages;
    uint32_t count, capacity;
    bool has_system;
};

struct turn {
    char *text;
    size_t bytes;
    enum wire_finish finish;
    uint32_t new_tokens;
    double ttft_ms, tokens_per_second;
};

static int conversation_add(struct conversation *conversation, const char *role, const char *content)
{
    if (conversation->count == conversation->capacity) {
        uint32_t capacity = conversation->capacity ? conversation->capacity * 2 : 16;
        struct wire_message *grown = realloc(conversation->messages, capacity * sizeof(*grown));
        if (!grown)
            return STATUS_NO_MEMORY;
        conversation->messages = grown;
        conversation->capacity = capacity;
    }
    char *copy = strdup(content);
    if (!copy)
        return STATUS_NO_MEMORY;
    conversation->messages[conversation->count++] =
        (struct wire_message){.role = role, .content = copy, .name = "", .tool_call_id = ""};
    return STATUS_OK;
}

static void conversation_cut(struct conversation *conversation, uint32_t count)
{
    while (conversation->count > count)
        free((char *)conversation->messages[--conversation->count].content);
}

static int conversation_set_system(struct conversation *conversation, const char *text)
{
    conversation_cut(conversation, 0);
    conversation->has_system = text && *text;
    return conversation->has_system ? conversation_add(conversation, "system", text) : STATUS_OK;
}

static bool on_response(void *context, const struct wire_generate_response *response)
{
    struct turn *turn = context;
    char *grown = realloc(turn->text, turn->bytes + response->text.length + 1);
    if (!grown)
        return false;
    turn->text = grown;
    memcpy(turn->text + turn->bytes, response->text.data, response->text.length);
    turn->bytes += response->text.length;
    turn->text[turn->bytes] = '\0';
    fwrite(response->text.data, 1, response->text.length, stdout);
    fflush(stdout);
    if (response->finish) {
        turn->finish = response->finish;
        turn->new_tokens = response->completion_tokens;
        turn->ttft_ms = response->ttft_ms;
        turn->tokens_per_second = response->tokens_per_second;
    }
    return true;
}

// Asks for the next turn. An interrupted answer stays in the conversation as far as it came.
static int answer(struct conversation *conversation, struct client *client,
                  const struct wire_generate_request *shape, struct error *error)
{
    struct turn turn = {0};
    struct wire_generate_request request = *shape;
    request.input = WIRE_INPUT_MESSAGES;
    request.messages = (struct wire_messages){
        .messages = conversation->messages, .n_messages = conversation->count, .template_arguments_json = ""};
    int status = client_generate(client, &request, on_response, &turn, error);
    if (status == STATUS_OK) {
        printf("\n");
        if (turn.finish && isatty(STDERR_FILENO))
            fprintf(stderr, "[%u tokens, first after %.0f ms, %.1f tokens/s%s]\n", turn.new_tokens,
                    turn.ttft_ms, turn.tokens_per_second,
                    turn.finish == WIRE_FINISH_LENGTH ? ", cut by length" : "");
        status = conversation_add(conversation, "assistant", turn.text ? turn.text : "");
    }
    free(turn.text);
    return status;
}

// One message from standard input, continuation lines joined; NULL at its end. The caller frees it.
static char *read_message(void)
{
    char *line = NULL, *message = NULL;
    size_t capacity = 0, length = 0;
    ssize_t got;
    bool more = true;
    while (more) {
        if (isatty(STDIN_FILENO)) {
            fputs(message ? ". " : "> ", stdout);
            fflush(stdout);
        }
        got = getline(&line, &capacity, stdin);
        if (got < 0)
            break;
        while (got > 0 && (line[got - 1] == '\n' || line[got - 1] == '\r'))
            line[--got] = '\0';
        more = got > 0 && line[got - 1] == '\\';
        if (more)
            line[got - 1] = '\n';
        char *grown = realloc(message, length + (size_t)got + 1);
        if (!grown)
            break;
        message = grown;
        memcpy(message + length, line, (size_t)got + 1);
        length += (size_t)got;
    }
    free(line);
    return message;
}

// 1: a command was done, 2: leave, 0: an ordinary message.
static int run_slash(struct conversation *conversation, const char *message)
{
    if (strcmp(message, "/exit") == 0 || strcmp(message, "/quit") == 0)
        return 2;
    if (strcmp(message, "/clear") == 0) {
        conversation_cut(conversation, conversation->has_system ? 1 : 0);
        return 1;
    }
    if (strncmp(message, "/system", 7) == 0 && (message[7] == ' ' || !message[7])) {
        conversation_set_system(conversation, message[7] ? message + 8 : NULL);
        return 1;
    }
    if (message[0] == '/' && !strchr(message, ' ')) {
        fprintf(stderr, "commands: /clear  /system TEXT  /exit\n");
        return 1;
    }
    return 0;
}

static int converse(struct client *client, const struct wire_generate_request *shape, const char *system,
                    struct error *error)
{
    struct conversation conversation = {0};
    int status = conversation_set_system(&conversation, system);
    while (status == STATUS_OK) {
        char *message = read_message();
        if (!message)
            break;
        int slash = message[0] ? run_slash(&conversation, message) : 1;
        if (slash == 0) {
            uint32_t before = conversation.count;
            status = conversation_add(&conversation, "user", message);
            if (status == STATUS_OK)
                status = answer(&conversation, client, shape, error);
            if (status && isatty(STDIN_FILENO)) { // a person may try again, a script should not go on
                fprintf(stderr, "%s\n", error->text);
                conversation_cut(&conversation, before);
                status = STATUS_OK;
            }
        }
        free(message);
        if (slash == 2)
            break;
    }
    conversation_cut(&conversation, 0);
    free(conversation.messages);
    return status;
}

static int check_model(struct client *client, struct arena *arena, struct error *error)
{
    struct wire_model model;
    int status = client_get_model(client, &model, arena, error);
    if (status)
        return status;
    if (!model.has_chat_template)
        return error_set(error, STATUS_UNSUPPORTED,
                         "%s has no chat template: use `strata generate`, which continues plain text",
                         model.name);
    if (isatty(STDIN_FILENO))
        printf("%s, context %u. /clear  /system TEXT  /exit\n", model.name, model.context);
    return STATUS_OK;
}

int command_chat(int argc, char **argv)
{
    struct error error = {0};
    struct config *config = NULL;
    struct client *client = NULL;
    struct arena arena = {0};
    struct wire_generate_request shape = {.model = "", .request_id = "", .n = 1};
    int code = cli_parse(&config, OPTIONS, argc, argv, USAGE, ABOUT);
    if (code >= 0)
        return code;
    int status = client_open(&client, config, &error);
    if (status == STATUS_OK)
        status = client_read_sampling(&shape, config, &arena, &error);
    if (status == STATUS_OK)
        status = check_model(client, &arena, &error);
    if (status == STATUS_OK)
        status = client_watch_interrupts(client, &error);
    if (status == STATUS_OK)
        status = converse(client, &shape, config_string(config, "system"), &error);
    client_close(client);
    arena_free(&arena);
    config_free(config);
    return cli_report(status, &error);
}
