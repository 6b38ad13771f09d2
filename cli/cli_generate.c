// `strata generate`: one prompt, its continuation streamed to standard output, a line of figures on standard
// error; or one JSON object. Ctrl-C cancels the call and still prints the figures of what came.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/cli_client.h"
#include "cli/cli_internal.h"

static const struct option OPTIONS[] = {
    CLIENT_OPTIONS,
    {"tokens", 0, OPTION_STRING, "ID,...", NULL, "A prompt of token ids instead of text.", 0, 0},
    {"chat", 0, OPTION_FLAG, NULL, NULL,
     "The text is a user's message: apply the model's chat template (plain text when it has none).", 0, 0},
    {"system", 0, OPTION_STRING, "TEXT", NULL, "With --chat: the system message.", 0, 0},
    {"special", 0, OPTION_FLAG, NULL, NULL, "Special tokens written in the text become their ids.", 0, 0},
    SAMPLING_OPTIONS,
    {"choices", 0, OPTION_INT, "N", "1", "Independent answers.", 1, MAX_CHOICES},
    {"logprobs", 0, OPTION_INT, "K", NULL, "Report the log-probability of each token and of K alternatives.",
     0, MAX_TOP_LOGPROBS},
    {"json", 'j', OPTION_FLAG, NULL, NULL, "Print one JSON object at the end.", 0, 0},
    {"quiet", 'q', OPTION_FLAG, NULL, NULL, "No line of figures.", 0, 0},
    {0},
};

static const char USAGE[] = "strata generate [options] [TEXT...]";
static const char ABOUT[] = "Sends a prompt to a running server and streams the continuation. Without TEXT "
                            "and --tokens the prompt is read "
                            "from standard input.";

struct answer { // of one choice
    char *text;
    size_t text_bytes;
    json_t *ids, *logprobs;
    const char *finish;
    uint32_t prompt_tokens, cached_tokens, completion_tokens;
    uint64_t seed;
    double ttft_ms, tokens_per_second;
    json_t *matched;
};

struct output {
    bool json, want_logprobs;
    uint32_t n_choices;
    bool keep; // collect the text of each choice instead of streaming it: for JSON, and for several choices
    bool shown;
    struct answer answers[MAX_CHOICES];
};

static const char *finish_name(enum wire_finish finish)
{
    switch (finish) {
    case WIRE_FINISH_STOP:
        return "stop";
    case WIRE_FINISH_LENGTH:
        return "length";
    case WIRE_FINISH_CANCELLED:
        return "cancelled";
    default:
        return NULL;
    }
}

static bool answer_append(struct answer *answer, const char *text, size_t bytes)
{
    char *grown = realloc(answer->text, answer->text_bytes + bytes + 1);
    if (!grown)
        return false;
    memcpy(grown + answer->text_bytes, text, bytes);
    answer->text = grown;
    answer->text_bytes += bytes;
    answer->text[answer->text_bytes] = '\0';
    return true;
}

static void keep_end(struct answer *answer, const struct wire_generate_response *response)
{
    answer->finish = finish_name(response->finish);
    answer->prompt_tokens = response->prompt_tokens;
    answer->cached_tokens = response->cached_tokens;
    answer->completion_tokens = response->completion_tokens;
    answer->seed = response->seed;
    answer->ttft_ms = response->ttft_ms;
    answer->tokens_per_second = response->tokens_per_second;
    if (response->matched_stop)
        answer->matched = json_text(response->stop.data, response->stop.length);
    else if (response->matched_id)
        answer->matched = json_integer(response->stop_id);
}

static bool on_response(void *context, const struct wire_generate_response *response)
{
    struct output *output = context;
    if (response->choice >= output->n_choices)
        return false;
    struct answer *answer = &output->answers[response->choice];
    for (uint32_t i = 0; output->json && i < response->n_token_ids; i++)
        json_array_append_new(answer->ids, json_integer(response->token_ids[i]));
    for (uint32_t i = 0; output->json && i < response->n_logprobs; i++)
        json_array_append_new(answer->logprobs, json_logprob(&response->logprobs[i]));
    if (output->keep && !answer_append(answer, response->text.data, response->text.length))
        return false;
    if (!output->keep && response->text.length) {
        output->shown = true;
        fwrite(response->text.data, 1, response->text.length, stdout);
        fflush(stdout);
    }
    if (response->finish)
        keep_end(answer, response);
    return true;
}

static json_t *answer_json(struct output *output, struct answer *answer)
{
    json_t *usage =
        json_pack("{s:i, s:i, s:i}", "prompt_tokens", (int)answer->prompt_tokens, "cached_tokens",
                  (int)answer->cached_tokens, "completion_tokens", (int)answer->completion_tokens);
    json_t *timings =
        json_pack("{s:f, s:f}", "ttft_ms", answer->ttft_ms, "tokens_per_second", answer->tokens_per_second);
    json_t *root = json_object();
    json_object_set_new(root, "text", json_text(answer->text ? answer->text : "", answer->text_bytes));
    json_object_set_new(root, "token_ids", answer->ids);
    json_object_set_new(root, "finish_reason", answer->finish ? json_string(answer->finish) : json_null());
    if (answer->matched)
        json_object_set_new(root, "matched", answer->matched);
    json_object_set_new(root, "seed", json_integer((json_int_t)answer->seed));
    json_object_set_new(root, "usage", usage);
    json_object_set_new(root, "timings", timings);
    if (output->want_logprobs)
        json_object_set_new(root, "logprobs", answer->logprobs);
    else
        json_decref(answer->logprobs);
    return root;
}

static void print_json(struct output *output)
{
    if (output->n_choices == 1) {
        cli_print_json(answer_json(output, &output->answers[0]));
        return;
    }
    json_t *choices = json_array();
    for (uint32_t i = 0; i < output->n_choices; i++)
        json_array_append_new(choices, answer_json(output, &output->answers[i]));
    cli_print_json(json_pack("{s:o}", "choices", choices));
}

static void print_choices(const struct output *output)
{
    for (uint32_t i = 0; i < output->n_choices; i++)
        printf("[%u] %s\n", i, output->answers[i].text ? output->answers[i].text : "");
}

static void print_figures(const struct output *output)
{
    uint32_t new_tokens = 0;
    double rate = 0;
    const struct answer *first = &output->answers[0];
    fflush(stdout);
    for (uint32_t i = 0; i < output->n_choices; i++) {
        new_tokens += output->answers[i].completion_tokens;
        rate += output->answers[i].tokens_per_second;
    }
    fprintf(stderr,
            "%u prompt tokens, %u new tokens, first token after %.0f ms, %.1f tokens/s, finished by %s\n",
            first->prompt_tokens, new_tokens, first->ttft_ms, rate,
            first->finish ? first->finish : "cancellation");
}

// Turns the text into a user's message when the model can chat.
static int apply_chat(struct client *client, struct wire_generate_request *request, const char *system,
                      struct arena *arena, struct error *error)
{
    struct wire_model model;
    int status = client_get_model(client, &model, arena, error);
    if (status)
        return status;
    if (!model.has_chat_template) {
        fprintf(stderr, "note: this model has no chat template; continuing the text instead\n");
        return STATUS_OK;
    }
    struct wire_message *messages = arena_alloc(arena, 2, sizeof(*messages));
    if (!messages)
        return error_set(error, STATUS_NO_MEMORY, "out of memory");
    uint32_t n = 0;
    if (system)
        messages[n++] =
            (struct wire_message){.role = "system", .content = system, .name = "", .tool_call_id = ""};
    messages[n++] =
        (struct wire_message){.role = "user", .content = request->text.data, .name = "", .tool_call_id = ""};
    request->input = WIRE_INPUT_MESSAGES;
    request->messages =
        (struct wire_messages){.messages = messages, .n_messages = n, .template_arguments_json = ""};
    return STATUS_OK;
}

static int prepare(struct wire_generate_request *request, const struct config *config, struct client *client,
                   struct arena *arena, struct error *error)
{
    int status = client_read_sampling(request, config, arena, error);
    if (status == STATUS_OK)
        status = client_read_prompt(request, config, arena, error);
    if (status)
        return status;
    request->model = request->request_id = "";
    request->parse_special = config_flag(config, "special");
    request->n = (uint32_t)config_int(config, "choices");
    request->has_n = request->n > 1;
    request->logprobs = config_is_set(config, "logprobs");
    request->top_logprobs = request->logprobs ? (uint32_t)config_int(config, "logprobs") : 0;
    if (config_flag(config, "chat") && request->input == WIRE_INPUT_TEXT)
        status = apply_chat(client, request, config_string(config, "system"), arena, error);
    return status;
}

static void output_init(struct output *output, const struct wire_generate_request *request, bool json)
{
    *output = (struct output){.json = json,
                              .keep = json || request->n > 1,
                              .want_logprobs = request->logprobs,
                              .n_choices = request->n};
    for (uint32_t i = 0; json && i < output->n_choices; i++) {
        output->answers[i].ids = json_array();
        output->answers[i].logprobs = json_array();
    }
}

int command_generate(int argc, char **argv)
{
    struct error error = {0};
    struct config *config = NULL;
    struct client *client = NULL;
    struct arena arena = {0};
    struct wire_generate_request request = {0};
    static struct output output;
    int code = cli_parse(&config, OPTIONS, argc, argv, USAGE, ABOUT);
    if (code >= 0)
        return code;
    int status = client_open(&client, config, &error);
    if (status == STATUS_OK)
        status = client_watch_interrupts(client, &error);
    if (status == STATUS_OK)
        status = prepare(&request, config, client, &arena, &error);
    if (status)
        goto done;
    output_init(&output, &request, config_flag(config, "json"));
    status = client_generate(client, &request, on_response, &output, &error);
    if (output.shown)
        putchar('\n');
    if (output.keep && !output.json)
        print_choices(&output);
    if (status == STATUS_OK && output.json)
        print_json(&output);
    if (status == STATUS_OK && !output.json && !config_flag(config, "quiet"))
        print_figures(&output);
    for (uint32_t i = 0; i < output.n_choices; i++)
        free(output.answers[i].text);
done:
    client_close(client);
    arena_free(&arena);
    config_free(config);
    return cli_report(status, &error);
}
