// Server reflection: answers from the descriptors that were compiled in (wire_descriptors, a
// FileDescriptorSet made at build time). Descriptors are small and asked for once per client, so every
// question walks them; there is no index to build. Requests and answers of v1 and v1alpha are the same bytes.
#include <stdio.h>

#include "grpc/reflection/v1/reflection.pb-c.h"
#include "proto/wire_internal.h"

extern const unsigned char wire_descriptors[];
extern const size_t wire_descriptors_bytes;

enum { MAX_SERVICES = 16 };
enum { CODE_INVALID_ARGUMENT = 3, CODE_NOT_FOUND = 5 }; // gRPC's, inside an error_response

// Descriptor messages, as far as names go. Each has its name in field 1.
enum kind { KIND_NONE, KIND_FILE, KIND_MESSAGE, KIND_ENUM, KIND_SERVICE, KIND_LEAF };

static enum kind child_kind(enum kind parent, uint32_t tag)
{
    static const struct {
        enum kind parent;
        uint32_t number;
        enum kind child;
    } children[] = {
        {KIND_FILE, 4, KIND_MESSAGE}, {KIND_FILE, 5, KIND_ENUM},    {KIND_FILE, 6, KIND_SERVICE},
        {KIND_FILE, 7, KIND_LEAF},    {KIND_MESSAGE, 2, KIND_LEAF}, {KIND_MESSAGE, 3, KIND_MESSAGE},
        {KIND_MESSAGE, 4, KIND_ENUM}, {KIND_MESSAGE, 6, KIND_LEAF}, {KIND_MESSAGE, 8, KIND_LEAF},
        {KIND_ENUM, 2, KIND_LEAF},    {KIND_SERVICE, 2, KIND_LEAF},
    };
    for (size_t i = 0; i < sizeof(children) / sizeof(children[0]); i++) {
        if (children[i].parent == parent && WIRE_TAG(children[i].number, WIRE_LENGTH) == tag)
            return children[i].child;
    }
    return KIND_NONE;
}

// The bytes of a string field; empty when absent.
static struct wire_text string_field(const uint8_t *bytes, size_t length, uint32_t number)
{
    struct wire_reader reader = wire_reader_of(bytes, length);
    for (struct wire_field f; wire_read_field(&reader, &f);) {
        if (f.tag == WIRE_TAG(number, WIRE_LENGTH))
            return (struct wire_text){(const char *)f.bytes, f.length};
    }
    return (struct wire_text){"", 0};
}

// Takes `name` and the dot behind it off the front of a symbol. True when the symbol begins so.
static bool strip(struct wire_text *symbol, struct wire_text name)
{
    if (symbol->length < name.length || memcmp(symbol->data, name.data, name.length) != 0)
        return false;
    size_t used = name.length;
    if (used < symbol->length && symbol->data[used] != '.')
        return false;
    used += used < symbol->length;
    *symbol = (struct wire_text){symbol->data + used, symbol->length - used};
    return true;
}

// What kind of thing `symbol`, relative to a parent, is; KIND_NONE when the parent has no such thing.
static enum kind find_symbol(enum kind parent, const uint8_t *bytes, size_t length, struct wire_text symbol)
{
    struct wire_reader reader = wire_reader_of(bytes, length);
    for (struct wire_field f; wire_read_field(&reader, &f);) {
        enum kind kind = child_kind(parent, f.tag), found = KIND_NONE;
        if (kind == KIND_NONE)
            continue;
        struct wire_text rest = symbol;
        if (strip(&rest, string_field(f.bytes, f.length, 1)))
            found = rest.length == 0 ? kind : find_symbol(kind, f.bytes, f.length, rest);
        if (!found && kind == KIND_ENUM) // an enum's values are named beside it
            found = find_symbol(kind, f.bytes, f.length, symbol);
        if (found)
            return found;
    }
    return KIND_NONE;
}

static bool next_file(struct wire_reader *set, struct wire_field *file)
{
    while (wire_read_field(set, file)) {
        if (file->tag == WIRE_TAG(1, WIRE_LENGTH))
            return true;
    }
    return false;
}

static bool same(struct wire_text a, struct wire_text b)
{
    return a.length == b.length && memcmp(a.data, b.data, a.length) == 0;
}

static bool find_file(struct wire_text name, struct wire_field *file)
{
    struct wire_reader set = wire_reader_of(wire_descriptors, wire_descriptors_bytes);
    while (next_file(&set, file)) {
        if (same(string_field(file->bytes, file->length, 1), name))
            return true;
    }
    return false;
}

static enum kind find_file_with(struct wire_text symbol, struct wire_field *file)
{
    if (symbol.length && symbol.data[0] == '.')
        symbol = (struct wire_text){symbol.data + 1, symbol.length - 1};
    struct wire_reader set = wire_reader_of(wire_descriptors, wire_descriptors_bytes);
    while (symbol.length && next_file(&set, file)) {
        struct wire_text rest = symbol, package = string_field(file->bytes, file->length, 2);
        if (!strip(&rest, package) || rest.length == 0)
            continue;
        enum kind kind = find_symbol(KIND_FILE, file->bytes, file->length, rest);
        if (kind)
            return kind;
    }
    return KIND_NONE;
}

// --- the answer

struct answer {
    Grpc__Reflection__V1__ServerReflectionResponse message;
    union {
        Grpc__Reflection__V1__FileDescriptorResponse files;
        Grpc__Reflection__V1__ExtensionNumberResponse extensions;
        Grpc__Reflection__V1__ListServiceResponse services;
        Grpc__Reflection__V1__ErrorResponse error;
    } body;
    ProtobufCBinaryData file;
    Grpc__Reflection__V1__ServiceResponse service[MAX_SERVICES], *pointers[MAX_SERVICES];
    char names[MAX_SERVICES][128], sentence[256];
};

static void answer_error(struct answer *a, int code, const char *what, struct wire_text name)
{
    int shown = name.length > 128 ? 128 : (int)name.length;
    snprintf(a->sentence, sizeof(a->sentence), "%s%s%.*s", what, shown ? " " : "", shown, name.data);
    grpc__reflection__v1__error_response__init(&a->body.error);
    a->body.error.error_code = code;
    a->message.message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ERROR_RESPONSE;
    a->message.error_response = &a->body.error;
}

static void answer_file(struct answer *a, const struct wire_field *file)
{
    grpc__reflection__v1__file_descriptor_response__init(&a->body.files);
    a->file = (ProtobufCBinaryData){.data = (uint8_t *)file->bytes, .len = file->length};
    a->body.files.file_descriptor_proto = &a->file;
    a->body.files.n_file_descriptor_proto = 1;
    a->message.message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_FILE_DESCRIPTOR_RESPONSE;
    a->message.file_descriptor_response = &a->body.files;
}

static void add_services(struct answer *a, const struct wire_field *file)
{
    struct wire_text package = string_field(file->bytes, file->length, 2);
    struct wire_reader reader = wire_reader_of(file->bytes, file->length);
    for (struct wire_field f; wire_read_field(&reader, &f);) {
        size_t i = a->body.services.n_service;
        if (f.tag != WIRE_TAG(6, WIRE_LENGTH) || i == MAX_SERVICES)
            continue;
        struct wire_text name = string_field(f.bytes, f.length, 1);
        int length = snprintf(a->names[i], sizeof(a->names[i]), "%.*s.%.*s", (int)package.length,
                              package.data, (int)name.length, name.data);
        grpc__reflection__v1__service_response__init(&a->service[i]);
        a->service[i].name = (ProtobufCBinaryData){.data = (uint8_t *)a->names[i], .len = (size_t)length};
        a->pointers[i] = &a->service[i];
        a->body.services.n_service++;
    }
}

static void answer_services(struct answer *a)
{
    grpc__reflection__v1__list_service_response__init(&a->body.services);
    a->body.services.service = a->pointers;
    struct wire_reader set = wire_reader_of(wire_descriptors, wire_descriptors_bytes);
    for (struct wire_field file; next_file(&set, &file);)
        add_services(a, &file);
    a->message.message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_LIST_SERVICES_RESPONSE;
    a->message.list_services_response = &a->body.services;
}

// None of our messages has extensions.
static void answer_extensions(struct answer *a, struct wire_text type, ProtobufCBinaryData as_asked)
{
    struct wire_field file;
    if (find_file_with(type, &file) != KIND_MESSAGE) {
        answer_error(a, CODE_NOT_FOUND, "there is no message type", type);
        return;
    }
    grpc__reflection__v1__extension_number_response__init(&a->body.extensions);
    a->body.extensions.base_type_name = as_asked;
    a->message.message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ALL_EXTENSION_NUMBERS_RESPONSE;
    a->message.all_extension_numbers_response = &a->body.extensions;
}

static void answer_question(struct answer *a, struct wire_decoder *d,
                            const Grpc__Reflection__V1__ServerReflectionRequest *asked)
{
    struct wire_field file;
    struct wire_text name;
    switch (asked->message_request_case) {
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_BY_FILENAME:
        name = wire_take_text(d, asked->file_by_filename, "file_by_filename");
        if (find_file(name, &file))
            answer_file(a, &file);
        else
            answer_error(a, CODE_NOT_FOUND, "there is no file", name);
        break;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_SYMBOL:
        name = wire_take_text(d, asked->file_containing_symbol, "file_containing_symbol");
        if (find_file_with(name, &file))
            answer_file(a, &file);
        else
            answer_error(a, CODE_NOT_FOUND, "there is no symbol", name);
        break;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_EXTENSION:
        name = wire_take_text(d, asked->file_containing_extension->containing_type, "containing_type");
        answer_error(a, CODE_NOT_FOUND, "there are no extensions of", name);
        break;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_ALL_EXTENSION_NUMBERS_OF_TYPE:
        name = wire_take_text(d, asked->all_extension_numbers_of_type, "all_extension_numbers_of_type");
        answer_extensions(a, name, asked->all_extension_numbers_of_type);
        break;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_LIST_SERVICES:
        wire_take_text(d, asked->list_services, "list_services"); // it goes back in original_request
        answer_services(a);
        break;
    default:
        answer_error(a, CODE_INVALID_ARGUMENT, "the request asks nothing", (struct wire_text){"", 0});
    }
}

int wire_reflect(struct wire_bytes *to, const uint8_t *bytes, size_t length, struct error *error)
{
    struct arena arena = {0};
    struct wire_decoder d = {
        .arena = &arena, .error = error, .message = "ServerReflectionRequest", .blame = STATUS_INVALID};
    Grpc__Reflection__V1__ServerReflectionRequest *asked =
        wire_unpack(&d, &grpc__reflection__v1__server_reflection_request__descriptor, bytes, length);
    struct answer *a = wire_make(&d, 1, sizeof(*a));
    if (asked && a) {
        struct wire_encoder e = {0};
        grpc__reflection__v1__server_reflection_response__init(&a->message);
        wire_take_text(&d, asked->host, "host");
        a->message.valid_host = asked->host;
        a->message.original_request = asked;
        answer_question(a, &d, asked);
        if (a->message.message_response_case ==
            GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ERROR_RESPONSE)
            a->body.error.error_message = wire_put_cstr(&e, a->sentence); // may cut a character of the name
        int status = d.status ? STATUS_OK : wire_encode_end(&e, to, &a->message.base);
        if (status)
            wire_refuse(&d, status, "no memory for the answer");
        arena_free(&e.scratch);
    }
    arena_free(&arena);
    return d.status;
}
