// What the wire_*.c files share: a growing output, text checks, the bridge to protobuf-c, and a plain reader
// and writer of protobuf fields for messages that cross every step.
#ifndef STRATA_WIRE_INTERNAL_H
#define STRATA_WIRE_INTERNAL_H

#include <protobuf-c/protobuf-c.h>
#include <string.h>

#include "proto/wire.h"

// --- output

int wire_reserve(struct wire_bytes *to, size_t more); // room for `more` bytes behind to->length
int wire_pack(struct wire_bytes *to, const ProtobufCMessage *message); // replaces the content

// --- encoding through generated code

// Collects what a message needs besides the caller's struct. The first failure stays in `status`.
struct wire_encoder {
    struct arena scratch;
    int status;
};
void *wire_scratch(struct wire_encoder *encoder, size_t count, size_t size); // NULL only with status set
// A `string` field. Bytes that are not UTF-8 are a mistake of ours; the client gets U+FFFD in their place
// rather than a message its library refuses.
ProtobufCBinaryData wire_put_text(struct wire_encoder *encoder, struct wire_text text);
ProtobufCBinaryData wire_put_cstr(struct wire_encoder *encoder, const char *text); // NULL = ""
// Packs unless something failed before, and frees the scratch memory.
int wire_encode_end(struct wire_encoder *encoder, struct wire_bytes *to, const ProtobufCMessage *message);

// --- decoding through generated code

// The first failure stays in `status`; what follows it yields empty values.
struct wire_decoder {
    struct arena *arena;
    struct error *error;
    const char *message; // its name, for sentences
    int blame;           // STATUS_INVALID or STATUS_CORRUPT
    int status;
};
// NULL with status set when the bytes are not such a message. Everything it points to is arena memory, and a
// NUL follows every bytes field.
void *wire_unpack(struct wire_decoder *decoder, const ProtobufCMessageDescriptor *descriptor,
                  const uint8_t *bytes, size_t length);
void wire_refuse(struct wire_decoder *decoder, int status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
struct wire_text wire_take_text(struct wire_decoder *decoder, ProtobufCBinaryData from, const char *field);
const char *wire_take_cstr(struct wire_decoder *decoder, ProtobufCBinaryData from, const char *field);
uint32_t wire_take_count(struct wire_decoder *decoder, size_t count, size_t most, const char *field);
void *wire_make(struct wire_decoder *decoder, size_t count,
                size_t size); // NULL when count is 0 or memory is out

// --- fields one by one

enum { WIRE_VARINT = 0, WIRE_FIXED64 = 1, WIRE_LENGTH = 2, WIRE_FIXED32 = 5 };
#define WIRE_TAG(number, type) ((uint32_t)(number) << 3 | (type))

struct wire_reader {
    const uint8_t *at, *end;
    bool bad;
};
struct wire_field {
    uint32_t tag;
    uint64_t value;       // all but WIRE_LENGTH
    const uint8_t *bytes; // WIRE_LENGTH
    size_t length;
};
// False at the end and when the bytes are malformed (then reader->bad).
bool wire_read_field(struct wire_reader *reader, struct wire_field *field);
bool wire_read_varint(struct wire_reader *reader, uint64_t *value);

static inline struct wire_reader wire_reader_of(const uint8_t *bytes, size_t length)
{
    return (struct wire_reader){.at = bytes, .end = bytes ? bytes + length : NULL};
}

// Writers into memory that is known to be large enough; each returns the new end.
enum { WIRE_MAX_VARINT = 10 };
static inline uint8_t *wire_write_varint(uint8_t *at, uint64_t value)
{
    for (; value >= 0x80; value >>= 7)
        *at++ = (uint8_t)(value | 0x80);
    *at++ = (uint8_t)value;
    return at;
}
static inline size_t wire_varint_bytes(uint64_t value)
{
    return (size_t)(70 - __builtin_clzll(value | 1)) / 7;
}
// A varint field; zero is not written. `number` below 16: a tag of one byte.
static inline uint8_t *wire_write_field(uint8_t *at, uint32_t number, uint64_t value)
{
    if (value == 0)
        return at;
    *at++ = (uint8_t)WIRE_TAG(number, WIRE_VARINT);
    return wire_write_varint(at, value);
}
static inline uint8_t *wire_write_float(uint8_t *at, uint32_t number, float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    if (bits == 0)
        return at;
    *at++ = (uint8_t)WIRE_TAG(number, WIRE_FIXED32);
    for (int i = 0; i < 4; i++)
        *at++ = (uint8_t)(bits >> 8 * i);
    return at;
}
static inline float wire_float_of(uint64_t value)
{
    uint32_t bits = (uint32_t)value;
    float result;
    memcpy(&result, &bits, sizeof(result));
    return result;
}

// --- wire_messages.c: chat messages, part of two requests

struct Strata__V1__Messages;
// NULL when memory is out (encoder->status says so).
struct Strata__V1__Messages *wire_put_messages(struct wire_encoder *encoder,
                                               const struct wire_messages *from);
void wire_take_messages(struct wire_decoder *decoder, struct wire_messages *out,
                        const struct Strata__V1__Messages *from);

// --- wire_step.c: the bodies of StepPlan and StepResult

int wire_append_plan(struct wire_bytes *to, const struct step_plan *plan);
int wire_append_result(struct wire_bytes *to, const struct step_result *result);
int wire_read_plan(struct step_plan *plan, const uint8_t *bytes, size_t length, struct error *error);
int wire_read_result(struct step_result *result, const uint8_t *bytes, size_t length, struct error *error);
// Gives an empty result arrays of the arena that fit what the bytes hold.
int wire_size_result(struct step_result *result, const uint8_t *bytes, size_t length, struct arena *arena);

#endif
