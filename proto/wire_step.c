// Step plans and results, the two messages that cross at every step. They are written and read field by
// field, straight from and into their arrays: no intermediate structs, no memory of their own. The format is
// StepPlan and StepResult of pool.proto; the tests hold it against the generated code.
#include "proto/wire_internal.h"

enum {
    // Upper bounds of one encoded record, its own tag and length included.
    MAX_COMMAND_BYTES = 192,
    MAX_ROW_BYTES = 128,
    MAX_SAMPLE_BYTES = 64,
    CHUNK = 512, // array elements handed on at once
};

// --- writing

static uint8_t *write_record(uint8_t *at, uint32_t number, const uint8_t *record, size_t length)
{
    *at++ = (uint8_t)WIRE_TAG(number, WIRE_LENGTH);
    at = wire_write_varint(at, length);
    memcpy(at, record, length);
    return at + length;
}

static uint8_t *write_sampling(uint8_t *at, const struct sampling_params *p)
{
    at = wire_write_float(at, 1, p->temperature);
    at = wire_write_field(at, 2, p->top_k);
    at = wire_write_float(at, 3, p->top_p);
    at = wire_write_float(at, 4, p->min_p);
    at = wire_write_float(at, 5, p->repetition_penalty);
    at = wire_write_float(at, 6, p->presence_penalty);
    at = wire_write_float(at, 7, p->frequency_penalty);
    if (p->seed) {
        *at++ = (uint8_t)WIRE_TAG(8, WIRE_FIXED64);
        for (int i = 0; i < 8; i++)
            *at++ = (uint8_t)(p->seed >> 8 * i);
    }
    return wire_write_field(at, 9, p->min_tokens);
}

static uint8_t *write_command(uint8_t *at, const struct step_command *c)
{
    uint8_t record[MAX_COMMAND_BYTES], sampling[64], *end = record;
    end = wire_write_field(end, 1, c->kind);
    end = wire_write_field(end, 2, c->slot);
    end = wire_write_field(end, 3, c->table_first);
    end = wire_write_field(end, 4, c->pages_first);
    end = wire_write_field(end, 5, c->pages_count);
    end = wire_write_field(end, 6, c->copy_from);
    end = wire_write_field(end, 7, c->copy_to);
    if (c->kind == STEP_OPEN)
        end = write_record(end, 8, sampling, (size_t)(write_sampling(sampling, &c->sampling) - sampling));
    end = wire_write_field(end, 9, c->choice);
    end = wire_write_field(end, 10, c->history_first);
    end = wire_write_field(end, 11, c->history_count);
    end = wire_write_field(end, 12, c->history_prompt);
    end = wire_write_field(end, 13, c->bias_first);
    end = wire_write_field(end, 14, c->bias_count);
    end = wire_write_field(end, 15, c->ban_first);
    if (c->ban_count) { // field 16: a tag of two bytes
        end = wire_write_varint(end, WIRE_TAG(16, WIRE_VARINT));
        end = wire_write_varint(end, c->ban_count);
    }
    return write_record(at, 3, record, (size_t)(end - record));
}

static uint8_t *write_row(uint8_t *at, const struct step_row *r)
{
    uint8_t record[MAX_ROW_BYTES], *end = record;
    end = wire_write_field(end, 1, r->slot);
    end = wire_write_field(end, 2, r->position);
    end = wire_write_field(end, 3, r->count);
    end = wire_write_field(end, 4, r->from_sample);
    end = wire_write_field(end, 5, r->must_wait);
    end = wire_write_field(end, 6, r->tokens_first);
    end = wire_write_field(end, 7, r->source_step);
    end = wire_write_field(end, 8, r->source_row);
    end = wire_write_field(end, 9, r->source_draw);
    end = wire_write_field(end, 10, r->draws);
    end = wire_write_field(end, 11, r->logits);
    end = wire_write_field(end, 12, r->logprobs);
    end = wire_write_field(end, 13, r->top_logprobs);
    uint32_t zigzag = (uint32_t)r->next_token << 1 ^ (r->next_token < 0 ? UINT32_MAX : 0);
    end = wire_write_field(end, 14, zigzag);
    end = wire_write_field(end, 15, r->generated);
    return write_record(at, 4, record, (size_t)(end - record));
}

// Elements of a packed array: 4 bytes every `stride` bytes. Negative numbers are ten bytes long, as int32 is
// on the wire.
static uint64_t element(const void *array, size_t index, size_t stride, bool is_signed)
{
    uint32_t value;
    memcpy(&value, (const char *)array + index * stride, sizeof(value));
    return is_signed ? (uint64_t)(int64_t)(int32_t)value : value;
}

static size_t packed_bytes(const void *array, size_t count, size_t stride, bool is_signed)
{
    size_t bytes = 0;
    for (size_t i = 0; i < count; i++)
        bytes += wire_varint_bytes(element(array, i, stride, is_signed));
    return bytes;
}

static int append_packed(struct wire_bytes *to, uint32_t number, const void *array, size_t count,
                         size_t stride, bool is_signed)
{
    if (count == 0)
        return STATUS_OK;
    size_t bytes = packed_bytes(array, count, stride, is_signed);
    if (wire_reserve(to, bytes + 1 + WIRE_MAX_VARINT))
        return STATUS_NO_MEMORY;
    uint8_t *at = to->data + to->length;
    *at++ = (uint8_t)WIRE_TAG(number, WIRE_LENGTH);
    at = wire_write_varint(at, bytes);
    for (size_t i = 0; i < count; i++)
        at = wire_write_varint(at, element(array, i, stride, is_signed));
    to->length = (size_t)(at - to->data);
    return STATUS_OK;
}

static int append_floats(struct wire_bytes *to, uint32_t number, const void *array, size_t count,
                         size_t stride)
{
    if (count == 0)
        return STATUS_OK;
    if (wire_reserve(to, count * 4 + 1 + WIRE_MAX_VARINT))
        return STATUS_NO_MEMORY;
    uint8_t *at = to->data + to->length;
    *at++ = (uint8_t)WIRE_TAG(number, WIRE_LENGTH);
    at = wire_write_varint(at, count * 4);
    for (size_t i = 0; i < count; i++, at += 4) {
        uint64_t bits = element(array, i, stride, false);
        for (int j = 0; j < 4; j++)
            at[j] = (uint8_t)(bits >> 8 * j);
    }
    to->length = (size_t)(at - to->data);
    return STATUS_OK;
}

int wire_append_plan(struct wire_bytes *to, const struct step_plan *plan)
{
    size_t records = (size_t)plan->n_commands * MAX_COMMAND_BYTES + (size_t)plan->n_rows * MAX_ROW_BYTES;
    if (wire_reserve(to, records + 64))
        return STATUS_NO_MEMORY;
    uint8_t *at = to->data + to->length;
    at = wire_write_field(at, 1, plan->epoch);
    at = wire_write_field(at, 2, plan->number);
    for (uint32_t i = 0; i < plan->n_commands; i++)
        at = write_command(at, &plan->commands[i]);
    for (uint32_t i = 0; i < plan->n_rows; i++)
        at = write_row(at, &plan->rows[i]);
    to->length = (size_t)(at - to->data);
    const size_t stride = sizeof(struct logit_bias);
    if (append_packed(to, 5, plan->tokens, plan->n_tokens, sizeof(*plan->tokens), true) ||
        append_packed(to, 6, plan->pages, plan->n_pages, sizeof(*plan->pages), false))
        return STATUS_NO_MEMORY;
    if (plan->n_biases == 0)
        return STATUS_OK;
    if (append_packed(to, 7, &plan->biases->token, plan->n_biases, stride, true))
        return STATUS_NO_MEMORY;
    return append_floats(to, 8, &plan->biases->bias, plan->n_biases, stride);
}

// Samples and prompt logprobs have the same shape: two indices, the token, its logprob, its alternatives.
static uint8_t *write_scored(uint8_t *at, uint32_t number, const uint32_t where[2], int32_t token,
                             float logprob, uint32_t top_first, uint32_t top_count)
{
    uint8_t record[MAX_SAMPLE_BYTES], *end = record;
    end = wire_write_field(end, 1, where[0]);
    end = wire_write_field(end, 2, where[1]);
    end = wire_write_field(end, 3, (uint64_t)(int64_t)token);
    end = wire_write_float(end, 4, logprob);
    end = wire_write_field(end, 5, top_first);
    end = wire_write_field(end, 6, top_count);
    return write_record(at, number, record, (size_t)(end - record));
}

int wire_append_result(struct wire_bytes *to, const struct step_result *result)
{
    if (wire_reserve(to, ((size_t)result->n_samples + result->n_prompts) * MAX_SAMPLE_BYTES + 64))
        return STATUS_NO_MEMORY;
    uint8_t *at = to->data + to->length;
    at = wire_write_field(at, 1, result->epoch);
    at = wire_write_field(at, 2, result->number);
    for (uint32_t i = 0; i < result->n_samples; i++) {
        const struct step_sample *s = &result->samples[i];
        at = write_scored(at, 3, (uint32_t[2]){s->row, s->draw}, s->token, s->logprob, s->top_first,
                          s->top_count);
    }
    for (uint32_t i = 0; i < result->n_prompts; i++) {
        const struct step_prompt_logprob *p = &result->prompts[i];
        at = write_scored(at, 4, (uint32_t[2]){p->row, p->position}, p->token.token, p->token.logprob,
                          p->top_first, p->top_count);
    }
    at = wire_write_field(at, 7, result->compute_us);
    at = wire_write_field(at, 8, result->wait_us);
    to->length = (size_t)(at - to->data);
    if (result->n_tops == 0)
        return STATUS_OK;
    const size_t stride = sizeof(struct token_logprob);
    if (append_packed(to, 5, &result->tops->token, result->n_tops, stride, true))
        return STATUS_NO_MEMORY;
    return append_floats(to, 6, &result->tops->logprob, result->n_tops, stride);
}

// --- reading

static void read_sampling(struct sampling_params *p, struct wire_reader *reader)
{
    *p = (struct sampling_params){0};
    for (struct wire_field f; wire_read_field(reader, &f);) {
        switch (f.tag) {
        case WIRE_TAG(1, WIRE_FIXED32):
            p->temperature = wire_float_of(f.value);
            break;
        case WIRE_TAG(2, WIRE_VARINT):
            p->top_k = (uint32_t)f.value;
            break;
        case WIRE_TAG(3, WIRE_FIXED32):
            p->top_p = wire_float_of(f.value);
            break;
        case WIRE_TAG(4, WIRE_FIXED32):
            p->min_p = wire_float_of(f.value);
            break;
        case WIRE_TAG(5, WIRE_FIXED32):
            p->repetition_penalty = wire_float_of(f.value);
            break;
        case WIRE_TAG(6, WIRE_FIXED32):
            p->presence_penalty = wire_float_of(f.value);
            break;
        case WIRE_TAG(7, WIRE_FIXED32):
            p->frequency_penalty = wire_float_of(f.value);
            break;
        case WIRE_TAG(8, WIRE_FIXED64):
            p->seed = f.value;
            break;
        case WIRE_TAG(9, WIRE_VARINT):
            p->min_tokens = (uint32_t)f.value;
            break;
        default:
            break;
        }
    }
}

// Where a command's plain numbers go, by field number.
static uint32_t *command_number(struct step_command *c, uint32_t number)
{
    uint32_t *const places[] = {NULL,
                                NULL, // kind
                                &c->slot,       &c->table_first,   &c->pages_first,   &c->pages_count,
                                &c->copy_from,  &c->copy_to,
                                NULL, // sampling
                                &c->choice,     &c->history_first, &c->history_count, &c->history_prompt,
                                &c->bias_first, &c->bias_count,    &c->ban_first,     &c->ban_count};
    return number < sizeof(places) / sizeof(places[0]) ? places[number] : NULL;
}

static void read_command(struct step_command *c, struct wire_reader *reader)
{
    for (struct wire_field f; wire_read_field(reader, &f);) {
        if (f.tag == WIRE_TAG(1, WIRE_VARINT)) {
            c->kind = (enum step_command_kind)f.value;
        } else if (f.tag == WIRE_TAG(8, WIRE_LENGTH)) {
            struct wire_reader inner = wire_reader_of(f.bytes, f.length);
            read_sampling(&c->sampling, &inner);
            reader->bad |= inner.bad;
        } else if ((f.tag & 7) == WIRE_VARINT) {
            uint32_t *place = command_number(c, f.tag >> 3);
            if (place)
                *place = (uint32_t)f.value;
        }
    }
}

static void read_row(struct step_row *r, struct wire_reader *reader)
{
    r->next_token = 0; // absent is zero on the wire
    for (struct wire_field f; wire_read_field(reader, &f);) {
        switch (f.tag) {
        case WIRE_TAG(1, WIRE_VARINT):
            r->slot = (uint32_t)f.value;
            break;
        case WIRE_TAG(2, WIRE_VARINT):
            r->position = (uint32_t)f.value;
            break;
        case WIRE_TAG(3, WIRE_VARINT):
            r->count = (uint32_t)f.value;
            break;
        case WIRE_TAG(4, WIRE_VARINT):
            r->from_sample = f.value != 0;
            break;
        case WIRE_TAG(5, WIRE_VARINT):
            r->must_wait = f.value != 0;
            break;
        case WIRE_TAG(6, WIRE_VARINT):
            r->tokens_first = (uint32_t)f.value;
            break;
        case WIRE_TAG(7, WIRE_VARINT):
            r->source_step = f.value;
            break;
        case WIRE_TAG(8, WIRE_VARINT):
            r->source_row = (uint32_t)f.value;
            break;
        case WIRE_TAG(9, WIRE_VARINT):
            r->source_draw = (uint32_t)f.value;
            break;
        case WIRE_TAG(10, WIRE_VARINT):
            r->draws = (uint32_t)f.value;
            break;
        case WIRE_TAG(11, WIRE_VARINT):
            r->logits = (enum step_logits)f.value;
            break;
        case WIRE_TAG(12, WIRE_VARINT):
            r->logprobs = f.value != 0;
            break;
        case WIRE_TAG(13, WIRE_VARINT):
            r->top_logprobs = (uint32_t)f.value;
            break;
        case WIRE_TAG(14, WIRE_VARINT):
            r->next_token = (int32_t)((uint32_t)f.value >> 1 ^ -((uint32_t)f.value & 1));
            break;
        case WIRE_TAG(15, WIRE_VARINT):
            r->generated = f.value != 0;
            break;
        default:
            break;
        }
    }
}

// Array elements on their way into a plan or a result. The flush takes `count` values and says whether there
// was room.
struct chunk {
    uint32_t values[CHUNK];
    uint32_t count;
    bool (*flush)(void *target, const uint32_t *values, uint32_t count);
    void *target;
    bool full; // the target refused
};

static void chunk_flush(struct chunk *chunk)
{
    if (chunk->count && !chunk->full)
        chunk->full = !chunk->flush(chunk->target, chunk->values, chunk->count);
    chunk->count = 0;
}

static void chunk_add(struct chunk *chunk, uint32_t value)
{
    if (chunk->count == CHUNK)
        chunk_flush(chunk);
    chunk->values[chunk->count++] = value;
}

// Packed or single, as protobuf allows. `fixed`: floats.
static void read_array(struct chunk *chunk, const struct wire_field *f, bool fixed,
                       struct wire_reader *reader)
{
    if ((f->tag & 7) != WIRE_LENGTH) {
        chunk_add(chunk, (uint32_t)f->value);
    } else if (fixed) {
        reader->bad |= f->length % 4 != 0;
        for (size_t i = 0; i + 4 <= f->length; i += 4)
            chunk_add(chunk, f->bytes[i] | (uint32_t)f->bytes[i + 1] << 8 | (uint32_t)f->bytes[i + 2] << 16 |
                                 (uint32_t)f->bytes[i + 3] << 24);
    } else {
        struct wire_reader inner = wire_reader_of(f->bytes, f->length);
        for (uint64_t value; inner.at < inner.end && wire_read_varint(&inner, &value);)
            chunk_add(chunk, (uint32_t)value);
        reader->bad |= inner.bad;
    }
    chunk_flush(chunk);
}

static bool flush_tokens(void *plan, const uint32_t *values, uint32_t count)
{
    return step_plan_add_tokens(plan, (const int32_t *)values, count) >= 0;
}

static bool flush_pages(void *plan, const uint32_t *values, uint32_t count)
{
    return step_plan_add_pages(plan, values, count) >= 0;
}

// Biases and alternatives come as two arrays, ids and numbers, each of which may arrive first.
struct pairs {
    struct step_plan *plan;
    struct step_result *result;
    uint32_t n_ids, n_numbers;
};

static bool pairs_grow(struct pairs *pairs, uint32_t need)
{
    if (pairs->result)
        return need <= pairs->result->n_tops ||
               step_result_add_tops(pairs->result, need - pairs->result->n_tops) != NULL;
    static const struct logit_bias none[CHUNK];
    while (pairs->plan->n_biases < need) {
        uint32_t more = need - pairs->plan->n_biases;
        if (step_plan_add_biases(pairs->plan, none, more > CHUNK ? CHUNK : more) < 0)
            return false;
    }
    return true;
}

static bool flush_ids(void *target, const uint32_t *values, uint32_t count)
{
    struct pairs *pairs = target;
    if (!pairs_grow(pairs, pairs->n_ids + count))
        return false;
    for (uint32_t i = 0; i < count; i++, pairs->n_ids++) {
        if (pairs->result)
            pairs->result->tops[pairs->n_ids].token = (int32_t)values[i];
        else
            pairs->plan->biases[pairs->n_ids].token = (int32_t)values[i];
    }
    return true;
}

static bool flush_numbers(void *target, const uint32_t *values, uint32_t count)
{
    struct pairs *pairs = target;
    if (!pairs_grow(pairs, pairs->n_numbers + count))
        return false;
    for (uint32_t i = 0; i < count; i++, pairs->n_numbers++) {
        if (pairs->result)
            pairs->result->tops[pairs->n_numbers].logprob = wire_float_of(values[i]);
        else
            pairs->plan->biases[pairs->n_numbers].bias = wire_float_of(values[i]);
    }
    return true;
}

static int verdict(const struct wire_reader *reader, bool full, const struct pairs *pairs, const char *what,
                   struct error *error)
{
    if (reader->bad)
        return error_set(error, STATUS_CORRUPT, "a step %s is malformed", what);
    if (full)
        return error_set(error, STATUS_EXHAUSTED,
                         "a step %s is larger than its limits (%d rows, %d commands), or memory is out", what,
                         MAX_STEP_ROWS, MAX_STEP_COMMANDS);
    if (pairs->n_ids != pairs->n_numbers)
        return error_set(error, STATUS_CORRUPT, "a step %s has %u ids for %u numbers", what, pairs->n_ids,
                         pairs->n_numbers);
    return STATUS_OK;
}

// One array field of a plan or a result; false when there is no room.
static bool take_array(const struct wire_field *f, bool fixed, struct wire_reader *reader, void *target,
                       bool (*flush)(void *, const uint32_t *, uint32_t))
{
    struct chunk chunk;
    chunk.count = 0;
    chunk.full = false;
    chunk.flush = flush;
    chunk.target = target;
    read_array(&chunk, f, fixed, reader);
    return !chunk.full;
}

// Returns whether the field found room.
static bool read_plan_field(struct step_plan *plan, struct pairs *pairs, const struct wire_field *f,
                            struct wire_reader *reader)
{
    struct wire_reader inner = wire_reader_of(f->bytes, f->length);
    switch (f->tag) {
    case WIRE_TAG(1, WIRE_VARINT):
        plan->epoch = f->value;
        return true;
    case WIRE_TAG(2, WIRE_VARINT):
        plan->number = f->value;
        return true;
    case WIRE_TAG(3, WIRE_LENGTH): {
        struct step_command *command = step_plan_add_command(plan, 0, 0);
        if (command)
            read_command(command, &inner);
        reader->bad |= inner.bad;
        return command != NULL;
    }
    case WIRE_TAG(4, WIRE_LENGTH): {
        struct step_row *row = step_plan_add_row(plan);
        if (row)
            read_row(row, &inner);
        reader->bad |= inner.bad;
        return row != NULL;
    }
    case WIRE_TAG(5, WIRE_LENGTH):
    case WIRE_TAG(5, WIRE_VARINT):
        return take_array(f, false, reader, plan, flush_tokens);
    case WIRE_TAG(6, WIRE_LENGTH):
    case WIRE_TAG(6, WIRE_VARINT):
        return take_array(f, false, reader, plan, flush_pages);
    case WIRE_TAG(7, WIRE_LENGTH):
    case WIRE_TAG(7, WIRE_VARINT):
        return take_array(f, false, reader, pairs, flush_ids);
    case WIRE_TAG(8, WIRE_LENGTH):
    case WIRE_TAG(8, WIRE_FIXED32):
        return take_array(f, true, reader, pairs, flush_numbers);
    default:
        return true;
    }
}

int wire_read_plan(struct step_plan *plan, const uint8_t *bytes, size_t length, struct error *error)
{
    step_plan_clear(plan);
    struct wire_reader reader = wire_reader_of(bytes, length);
    struct pairs pairs = {.plan = plan};
    bool room = true;
    for (struct wire_field f; room && wire_read_field(&reader, &f);)
        room = read_plan_field(plan, &pairs, &f, &reader);
    return verdict(&reader, !room, &pairs, "plan", error);
}

struct scored {
    uint32_t where[2], top_first, top_count;
    struct token_logprob token;
};

static struct scored read_scored(const struct wire_field *field, struct wire_reader *outer)
{
    struct scored s = {0};
    struct wire_reader reader = wire_reader_of(field->bytes, field->length);
    for (struct wire_field f; wire_read_field(&reader, &f);) {
        switch (f.tag) {
        case WIRE_TAG(1, WIRE_VARINT):
            s.where[0] = (uint32_t)f.value;
            break;
        case WIRE_TAG(2, WIRE_VARINT):
            s.where[1] = (uint32_t)f.value;
            break;
        case WIRE_TAG(3, WIRE_VARINT):
            s.token.token = (int32_t)f.value;
            break;
        case WIRE_TAG(4, WIRE_FIXED32):
            s.token.logprob = wire_float_of(f.value);
            break;
        case WIRE_TAG(5, WIRE_VARINT):
            s.top_first = (uint32_t)f.value;
            break;
        case WIRE_TAG(6, WIRE_VARINT):
            s.top_count = (uint32_t)f.value;
            break;
        default:
            break;
        }
    }
    outer->bad |= reader.bad;
    return s;
}

static bool add_sample(struct step_result *result, struct scored s)
{
    struct step_sample *sample = step_result_add_sample(result);
    if (sample)
        *sample = (struct step_sample){.row = s.where[0],
                                       .draw = s.where[1],
                                       .token = s.token.token,
                                       .logprob = s.token.logprob,
                                       .top_first = s.top_first,
                                       .top_count = s.top_count};
    return sample != NULL;
}

static bool add_prompt(struct step_result *result, struct scored s)
{
    struct step_prompt_logprob *prompt = step_result_add_prompt(result);
    if (prompt)
        *prompt = (struct step_prompt_logprob){.row = s.where[0],
                                               .position = s.where[1],
                                               .token = s.token,
                                               .top_first = s.top_first,
                                               .top_count = s.top_count};
    return prompt != NULL;
}

static bool read_result_field(struct step_result *result, struct pairs *pairs, const struct wire_field *f,
                              struct wire_reader *reader)
{
    switch (f->tag) {
    case WIRE_TAG(1, WIRE_VARINT):
        result->epoch = f->value;
        return true;
    case WIRE_TAG(2, WIRE_VARINT):
        result->number = f->value;
        return true;
    case WIRE_TAG(3, WIRE_LENGTH):
        return add_sample(result, read_scored(f, reader));
    case WIRE_TAG(4, WIRE_LENGTH):
        return add_prompt(result, read_scored(f, reader));
    case WIRE_TAG(5, WIRE_LENGTH):
    case WIRE_TAG(5, WIRE_VARINT):
        return take_array(f, false, reader, pairs, flush_ids);
    case WIRE_TAG(6, WIRE_LENGTH):
    case WIRE_TAG(6, WIRE_FIXED32):
        return take_array(f, true, reader, pairs, flush_numbers);
    case WIRE_TAG(7, WIRE_VARINT):
        result->compute_us = f->value;
        return true;
    case WIRE_TAG(8, WIRE_VARINT):
        result->wait_us = f->value;
        return true;
    default:
        return true;
    }
}

// Readers of a result index `tops` by what the samples say.
static int check_tops(const struct step_result *result, struct error *error)
{
    for (uint32_t i = 0; i < result->n_samples + result->n_prompts; i++) {
        bool sample = i < result->n_samples;
        uint32_t first =
            sample ? result->samples[i].top_first : result->prompts[i - result->n_samples].top_first;
        uint32_t count =
            sample ? result->samples[i].top_count : result->prompts[i - result->n_samples].top_count;
        if (first > result->n_tops || count > result->n_tops - first)
            return error_set(error, STATUS_CORRUPT, "a step result names alternatives %u to %u of %u", first,
                             first + count, result->n_tops);
    }
    return STATUS_OK;
}

int wire_read_result(struct step_result *result, const uint8_t *bytes, size_t length, struct error *error)
{
    step_result_clear(result);
    struct wire_reader reader = wire_reader_of(bytes, length);
    struct pairs pairs = {.result = result};
    bool room = true;
    for (struct wire_field f; room && wire_read_field(&reader, &f);)
        room = read_result_field(result, &pairs, &f, &reader);
    int status = verdict(&reader, !room, &pairs, "result", error);
    return status ? status : check_tops(result, error);
}

int wire_size_result(struct step_result *result, const uint8_t *bytes, size_t length, struct arena *arena)
{
    uint64_t samples = 0, prompts = 0, tops = 0, numbers = 0;
    struct wire_reader reader = wire_reader_of(bytes, length);
    for (struct wire_field f; wire_read_field(&reader, &f);) {
        samples += f.tag == WIRE_TAG(3, WIRE_LENGTH);
        prompts += f.tag == WIRE_TAG(4, WIRE_LENGTH);
        if (f.tag >> 3 == 5) // every element has one byte without the continuation bit
            for (size_t i = 0; i < f.length; i++)
                tops += f.bytes[i] < 0x80;
        tops += f.tag == WIRE_TAG(5, WIRE_VARINT);
        if (f.tag >> 3 == 6)
            numbers += f.length / 4 + (f.length == 0);
    }
    tops = tops > numbers ? tops : numbers;
    *result = (struct step_result){0};
    result->samples = arena_alloc(arena, samples, sizeof(*result->samples));
    result->prompts = arena_alloc(arena, prompts, sizeof(*result->prompts));
    result->tops = arena_alloc(arena, tops, sizeof(*result->tops));
    if (!result->samples || !result->prompts || !result->tops)
        return STATUS_NO_MEMORY;
    result->capacity.samples = (uint32_t)samples;
    result->capacity.prompts = (uint32_t)prompts;
    result->capacity.tops = (uint32_t)tops;
    return STATUS_OK;
}
