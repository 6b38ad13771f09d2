// Renders a model's own chat template with Jinja2, in a helper process the coordinator owns (chat_template.py
// on CPython with Debian's python3-jinja2): sandboxed, with a time limit, restarted when it dies or overruns.
// Rendering happens on a thread of its own; callers get a callback.
#ifndef STRATA_CHAT_TEMPLATE_H
#define STRATA_CHAT_TEMPLATE_H

#include <stddef.h>
#include <stdint.h>

#include "common/status.h"

struct chat_template;

struct chat_template_options {
    const char *source;    // the Jinja2 text; NULL when the model has none
    const char *bos, *eos; // texts of the tokens, "" when there are none
    const char *python;    // interpreter; NULL = /usr/bin/python3
    const char *helper;    // NULL = chat_template.py beside the running program
    int64_t timeout_us;    // of one rendering; 0 = 5 s
    uint32_t max_waiting;  // 0 = 256
};

// Starts lazily: a missing interpreter or package is reported by the first rendering, as a sentence.
int chat_template_new(struct chat_template **out, const struct chat_template_options *options,
                      struct error *error);
// Calls back everything that waits with STATUS_UNAVAILABLE, ends the helper.
void chat_template_free(struct chat_template *chat);

// `request_json`: {"messages": [...], "tools": [...] or null, "add_generation_prompt": true, "arguments":
// {...}}, with messages and tools in the form the templates expect (OpenAI's). Copied. `done` runs once, on
// the template's thread, unless this returns an error (STATUS_EXHAUSTED: too many wait; STATUS_UNSUPPORTED:
// the model has no template).
int chat_template_render(struct chat_template *chat, const char *request_json,
                         void (*done)(void *context, int status,
                                      const char *text /* rendered, or the sentence */, size_t length),
                         void *context, struct error *error);

#endif
