// Shared parts of the codecs: output bytes, text checks, and protobuf-c with an arena for an allocator. No
// threads, no state.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "common/utf8.h"
#include "proto/wire_internal.h"

void wire_bytes_free(struct wire_bytes *bytes)
{
    free(bytes->data);
    *bytes = (struct wire_bytes){0};
}

int wire_reserve(struct wire_bytes *to, size_t more)
{
    if (more > SIZE_MAX / 4 - to->length)
        return STATUS_NO_MEMORY;
    size_t need = to->length + more;
    if (need <= to->capacity)
        return STATUS_OK;
    size_t capacity = to->capacity * 2 > need ? to->capacity * 2 : need < 256 ? 256 : need;
    uint8_t *data = realloc(to->data, capacity);
    if (!data)
        return STATUS_NO_MEMORY;
    to->data = data;
    to->capacity = capacity;
    return STATUS_OK;
}

int wire_pack(struct wire_bytes *to, const ProtobufCMessage *message)
{
    to->length = 0;
    size_t size = protobuf_c_message_get_packed_size(message);
    int status = wire_reserve(to, size ? size : 1);
    if (!status)
        to->length = protobuf_c_message_pack(message, to->data);
    return status;
}

// --- encoding

void *wire_scratch(struct wire_encoder *encoder, size_t count, size_t size)
{
    void *memory = encoder->status ? NULL : arena_alloc(&encoder->scratch, count, size);
    if (!memory)
        encoder->status = STATUS_NO_MEMORY;
    return memory;
}

static ProtobufCBinaryData repair(struct wire_encoder *encoder, struct wire_text text)
{
    // Every byte can become a replacement of three.
    char *fixed = wire_scratch(encoder, text.length, 3);
    size_t used = 0;
    for (size_t at = 0, taken; fixed && at < text.length; at += taken) {
        bool whole = utf8_scan(text.data + at, text.length - at, &taken) == UTF8_WHOLE;
        memcpy(fixed + used, whole ? text.data + at : UTF8_REPLACEMENT, whole ? taken : 3);
        used += whole ? taken : 3;
    }
    return (ProtobufCBinaryData){.data = (uint8_t *)fixed, .len = used};
}

ProtobufCBinaryData wire_put_text(struct wire_encoder *encoder, struct wire_text text)
{
    if (text.length && utf8_valid_prefix(text.data, text.length) != text.length)
        return repair(encoder, text);
    return (ProtobufCBinaryData){.data = (uint8_t *)text.data, .len = text.length};
}

ProtobufCBinaryData wire_put_cstr(struct wire_encoder *encoder, const char *text)
{
    return wire_put_text(encoder, (struct wire_text){text, text ? strlen(text) : 0});
}

int wire_encode_end(struct wire_encoder *encoder, struct wire_bytes *to, const ProtobufCMessage *message)
{
    int status = encoder->status ? encoder->status : wire_pack(to, message);
    arena_free(&encoder->scratch);
    return status;
}

// --- decoding

void wire_refuse(struct wire_decoder *decoder, int status, const char *format, ...)
{
    if (decoder->status)
        return;
    char text[384];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    decoder->status = error_set(decoder->error, status, "%s: %s", decoder->message, text);
}

// Two bytes on the wire can make a struct of a hundred. The allowance covers any honest message and keeps a
// hostile one from multiplying the memory that it was allowed to send.
enum { MEMORY_ALLOWANCE = 1 << 20, MEMORY_FACTOR = 32 };

struct budget {
    struct arena *arena;
    size_t left;
};

static void *take(void *data, size_t size)
{
    struct budget *budget = data;
    // One byte more, and arena memory is zeroed: so every `bytes` field ends in a NUL.
    if (size >= budget->left)
        return NULL;
    budget->left -= size + 1;
    return arena_alloc(budget->arena, size + 1, 1);
}

static void keep(void *data, void *pointer)
{
    (void)data;
    (void)pointer; // the arena frees it
}

void *wire_unpack(struct wire_decoder *decoder, const ProtobufCMessageDescriptor *descriptor,
                  const uint8_t *bytes, size_t length)
{
    if (decoder->status)
        return NULL;
    if (length > MAX_POOL_MESSAGE_BYTES) {
        wire_refuse(decoder, STATUS_EXHAUSTED, "%zu bytes are more than the limit of %d", length,
                    MAX_POOL_MESSAGE_BYTES);
        return NULL;
    }
    struct budget budget = {decoder->arena, MEMORY_ALLOWANCE + MEMORY_FACTOR * length};
    ProtobufCAllocator allocator = {.alloc = take, .free = keep, .allocator_data = &budget};
    static const uint8_t nothing[1];
    void *message = protobuf_c_message_unpack(descriptor, &allocator, length, length ? bytes : nothing);
    if (!message)
        wire_refuse(decoder, decoder->blame, "these %zu bytes are not such a message", length);
    return message;
}

struct wire_text wire_take_text(struct wire_decoder *decoder, ProtobufCBinaryData from, const char *field)
{
    if (decoder->status || from.len == 0)
        return (struct wire_text){"", 0};
    size_t valid = utf8_valid_prefix(from.data, from.len);
    if (valid != from.len) {
        wire_refuse(decoder, decoder->blame, "%s is not valid UTF-8 at byte %zu", field, valid);
        return (struct wire_text){"", 0};
    }
    return (struct wire_text){(const char *)from.data, from.len};
}

const char *wire_take_cstr(struct wire_decoder *decoder, ProtobufCBinaryData from, const char *field)
{
    struct wire_text text = wire_take_text(decoder, from, field);
    const char *nul = memchr(text.data, '\0', text.length);
    if (nul) {
        wire_refuse(decoder, decoder->blame, "%s has a NUL at byte %zu", field, (size_t)(nul - text.data));
        return "";
    }
    return text.data;
}

uint32_t wire_take_count(struct wire_decoder *decoder, size_t count, size_t most, const char *field)
{
    if (count > most)
        wire_refuse(decoder, decoder->blame, "%zu %s are more than the limit of %zu", count, field, most);
    return decoder->status ? 0 : (uint32_t)count;
}

void *wire_make(struct wire_decoder *decoder, size_t count, size_t size)
{
    if (decoder->status || count == 0)
        return NULL;
    void *memory = arena_alloc(decoder->arena, count, size);
    if (!memory)
        wire_refuse(decoder, STATUS_NO_MEMORY, "no memory to take it in");
    return memory;
}

// --- fields

bool wire_read_varint(struct wire_reader *reader, uint64_t *value)
{
    uint64_t result = 0;
    for (unsigned shift = 0; shift < 64 && reader->at < reader->end; shift += 7) {
        uint8_t byte = *reader->at++;
        result |= (uint64_t)(byte & 0x7F) << shift;
        if (byte < 0x80) {
            *value = result;
            return true;
        }
    }
    reader->bad = true;
    return false;
}

static bool read_fixed(struct wire_reader *reader, size_t bytes, uint64_t *value)
{
    if ((size_t)(reader->end - reader->at) < bytes) {
        reader->bad = true;
        return false;
    }
    *value = 0;
    for (size_t i = 0; i < bytes; i++)
        *value |= (uint64_t)reader->at[i] << 8 * i;
    reader->at += bytes;
    return true;
}

bool wire_read_field(struct wire_reader *reader, struct wire_field *field)
{
    uint64_t tag;
    if (reader->at == reader->end || !wire_read_varint(reader, &tag))
        return false;
    field->tag = (uint32_t)tag;
    field->bytes = NULL;
    field->length = 0;
    field->value = 0;
    if (tag > UINT32_MAX || tag >> 3 == 0) {
        reader->bad = true;
        return false;
    }
    switch (tag & 7) {
    case WIRE_VARINT:
        return wire_read_varint(reader, &field->value);
    case WIRE_FIXED64:
        return read_fixed(reader, 8, &field->value);
    case WIRE_FIXED32:
        return read_fixed(reader, 4, &field->value);
    case WIRE_LENGTH: {
        uint64_t length;
        if (!wire_read_varint(reader, &length))
            return false;
        if (length > (size_t)(reader->end - reader->at))
            break;
        field->bytes = reader->at;
        field->length = (size_t)length;
        reader->at += length;
        return true;
    }
    default: // groups, which proto3 does not have
        break;
    }
    reader->bad = true;
    return false;
}
