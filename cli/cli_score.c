// `strata score`: the log-probability of every token of a text under the served model, and its perplexity. A
// Generate call with prompt_logprobs and no new tokens.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "cli/cli_client.h"
#include "cli/cli_internal.h"

static const struct option OPTIONS[] = {
    CLIENT_OPTIONS,
    {"tokens", 0, OPTION_STRING, "ID,...", NULL, "Token ids instead of text.", 0, 0},
    {"special", 0, OPTION_FLAG, NULL, NULL, "Special tokens written in the text become their ids.", 0, 0},
    {"top", 0, OPTION_INT, "K", "0", "Also report the K likeliest tokens at each position.", 0,
     MAX_TOP_LOGPROBS},
    {"json", 'j', OPTION_FLAG, NULL, NULL, "Print one JSON object.", 0, 0},
    {0},
};

static const char USAGE[] = "strata score [options] [TEXT...]";
static const char ABOUT[] = "Asks a running server how likely each token of a text is after those before it. "
                            "Without TEXT and --tokens the "
                            "text is read from standard input.";

struct scores {
    json_t *ids, *logprobs, *tops;
    bool json, want_tops;
    double sum;
    uint32_t n_tokens, n_scored;
};

static void print_row(const struct wire_logprob *logprob)
{
    json_t *text = json_text(logprob->text.data, logprob->text.length);
    char *quoted = json_dumps(text, JSON_ENCODE_ANY);
    if (logprob->unscored)
        printf("%8d  %12s  %s\n", logprob->token, "-", quoted ? quoted : "");
    else
        printf("%8d  %12.6f  %s\n", logprob->token, (double)logprob->logprob, quoted ? quoted : "");
    free(quoted);
    json_decref(text);
}

static bool on_response(void *context, const struct wire_generate_response *response)
{
    struct scores *scores = context;
    for (uint32_t i = 0; i < response->n_prompt_logprobs; i++) {
        const struct wire_logprob *logprob = &response->prompt_logprobs[i];
        scores->n_tokens++;
        if (!logprob->unscored) {
            scores->sum += logprob->logprob;
            scores->n_scored++;
        }
        if (!scores->json) {
            print_row(logprob);
            continue;
        }
        json_t *one = json_logprob(logprob);
        json_array_append_new(scores->ids, json_integer(logprob->token));
        json_array_append(scores->logprobs, json_object_get(one, "logprob"));
        json_array_append(scores->tops, json_object_get(one, "top"));
        json_decref(one);
    }
    return true;
}

static void print_scores(struct scores *scores)
{
    double perplexity = scores->n_scored ? exp(-scores->sum / scores->n_scored) : NAN;
    if (!scores->json && !scores->n_scored) {
        printf("no perplexity: the first token has nothing before it\n");
        return;
    }
    if (!scores->json) {
        printf("perplexity %.6g over %u tokens\n", perplexity, scores->n_scored);
        return;
    }
    json_t *root = json_pack("{s:O, s:O, s:o}", "token_ids", scores->ids, "logprobs", scores->logprobs,
                             "perplexity", isfinite(perplexity) ? json_real(perplexity) : json_null());
    if (scores->want_tops)
        json_object_set(root, "top_logprobs", scores->tops);
    cli_print_json(root);
}

int command_score(int argc, char **argv)
{
    struct error error = {0};
    struct config *config = NULL;
    struct client *client = NULL;
    struct arena arena = {0};
    struct wire_generate_request request = {
        .model = "", .request_id = "", .n = 1, .sampling = SAMPLING_DEFAULTS};
    int code = cli_parse(&config, OPTIONS, argc, argv, USAGE, ABOUT);
    if (code >= 0)
        return code;
    struct scores scores = {.ids = json_array(), .logprobs = json_array(), .tops = json_array()};
    scores.json = config_flag(config, "json");
    int status = client_open(&client, config, &error);
    if (status == STATUS_OK)
        status = client_read_prompt(&request, config, &arena, &error);
    request.parse_special = config_flag(config, "special");
    request.prompt_logprobs = request.has_max_tokens = true;
    request.top_logprobs = (uint32_t)config_int(config, "top");
    scores.want_tops = request.top_logprobs > 0;
    if (status == STATUS_OK)
        status = client_generate(client, &request, on_response, &scores, &error);
    if (status == STATUS_OK)
        print_scores(&scores);
    json_decref(scores.ids);
    json_decref(scores.logprobs);
    json_decref(scores.tops);
    client_close(client);
    arena_free(&arena);
    config_free(config);
    return cli_report(status, &error);
}
