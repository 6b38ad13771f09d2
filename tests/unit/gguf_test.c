// GGUF files, good and bad: what a good one gives back, and that each kind of damage is refused with a
// sentence that names the key or tensor. Files are built in memory; those that must be files go to a folder
// of their own.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/gguf.h"
#include "common/limits.h"
#include "common/tensor_type.h"
#include "tests/gguf_writer.h"
#include "tests/suite.h"

static struct gguf_writer writer;
static struct error error;
static unsigned char *file;
static size_t file_length;
static char folder[64];

static void set_up(void)
{
    writer = (struct gguf_writer){0};
    error = (struct error){0};
    file = NULL;
    strcpy(folder, P_tmpdir "/strata-gguf-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(folder));
}

static void tear_down(void)
{
    char command[128];
    snprintf(command, sizeof(command), "rm -r '%s'", folder);
    ck_assert_int_eq(system(command), 0);
    free(file);
    free(writer.values.data);
    free(writer.tensors.data);
    free(writer.data.data);
}

static struct gguf *open_bytes(void)
{
    struct gguf *gguf = NULL;
    int status = gguf_open_memory(&gguf, file, file_length, &error);
    ck_assert_msg(status == 0, "refused: %s", error.text);
    return gguf;
}

static struct gguf *open_writer(void)
{
    file = gguf_writer_finish(&writer, &file_length);
    return open_bytes();
}

// The bytes in `file` must be refused with `status` and a sentence that contains `part`.
static void refuse_bytes(int status, const char *part)
{
    struct gguf *gguf = (void *)1;
    ck_assert_int_eq(gguf_open_memory(&gguf, file, file_length, &error), status);
    ck_assert_ptr_eq(gguf, (void *)1);
    ck_assert_int_eq(error.status, status);
    ck_assert_msg(strstr(error.text, part) != NULL, "'%s' is not in '%s'", part, error.text);
    ck_assert_int_eq(gguf_open_memory(&gguf, file, file_length, NULL), status);
}

static void refuse_writer(int status, const char *part)
{
    file = gguf_writer_finish(&writer, &file_length);
    refuse_bytes(status, part);
    free(file);
    file = NULL;
}

static void path_of(char *path, size_t capacity, const char *name)
{
    snprintf(path, capacity, "%s/%s", folder, name);
}

static void refuse_file(const char *name, int status, const char *part)
{
    struct gguf *gguf = NULL;
    char path[256];
    path_of(path, sizeof(path), name);
    ck_assert_int_eq(gguf_open(&gguf, path, &error), status);
    ck_assert_msg(strstr(error.text, part) != NULL, "'%s' is not in '%s'", part, error.text);
    ck_assert_msg(strstr(error.text, folder) != NULL, "no path in '%s'", error.text);
}

// --- what a good file gives ---

START_TEST(reads_every_scalar)
{
    gguf_writer_raw(&writer, "u8", GGUF_U8, "\xFE", 1);
    gguf_writer_raw(&writer, "i8", GGUF_I8, "\xFE", 1);
    gguf_writer_raw(&writer, "u16", GGUF_U16, &(uint16_t){65000}, 2);
    gguf_writer_raw(&writer, "i16", GGUF_I16, &(int16_t){-300}, 2);
    gguf_writer_raw(&writer, "i32", GGUF_I32, &(int32_t){77}, 4);
    gguf_writer_raw(&writer, "u64", GGUF_U64, &(uint64_t){1ull << 40}, 8);
    gguf_writer_raw(&writer, "i64", GGUF_I64, &(int64_t){-5}, 8);
    gguf_writer_raw(&writer, "f64", GGUF_F64, &(double){0.25}, 8);
    gguf_writer_u32(&writer, "u32", 4000000000u);
    gguf_writer_f32(&writer, "f32", 1.5f);
    gguf_writer_bool(&writer, "yes", true);
    gguf_writer_string(&writer, "text", "hello");
    struct gguf *gguf = open_writer();
    static const struct {
        const char *key;
        int status;
        uint32_t value;
    } cases[] = {{"u8", 0, 254},
                 {"u16", 0, 65000},
                 {"i32", 0, 77},
                 {"u32", 0, 4000000000u},
                 {"i8", STATUS_CORRUPT, 0},
                 {"i16", STATUS_CORRUPT, 0},
                 {"i64", STATUS_CORRUPT, 0},
                 {"u64", STATUS_CORRUPT, 0},
                 {"f32", STATUS_CORRUPT, 0},
                 {"yes", STATUS_CORRUPT, 0},
                 {"text", STATUS_CORRUPT, 0},
                 {"no", STATUS_NOT_FOUND, 0}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        uint32_t value = 12345;
        ck_assert_int_eq(gguf_get_u32(gguf, cases[i].key, &value, &error), cases[i].status);
        ck_assert_uint_eq(value, cases[i].status ? 12345 : cases[i].value);
    }
    float f;
    bool yes = false;
    struct gguf_string text;
    ck_assert_int_eq(gguf_get_f32(gguf, "f32", &f, &error), 0);
    ck_assert(f == 1.5f);
    ck_assert_int_eq(gguf_get_f32(gguf, "f64", &f, &error), 0);
    ck_assert(f == 0.25f);
    ck_assert_int_eq(gguf_get_f32(gguf, "u32", &f, &error), STATUS_CORRUPT);
    ck_assert_int_eq(gguf_get_bool(gguf, "yes", &yes, &error), 0);
    ck_assert(yes);
    ck_assert_int_eq(gguf_get_bool(gguf, "u8", &yes, &error), STATUS_CORRUPT);
    ck_assert_int_eq(gguf_get_string(gguf, "text", &text, &error), 0);
    ck_assert_uint_eq(text.length, 5);
    ck_assert_mem_eq(text.bytes, "hello", 5);
    ck_assert_int_eq(gguf_get_string(gguf, "u8", &text, &error), STATUS_CORRUPT);
    ck_assert_ptr_nonnull(strstr(error.text, "'u8'"));
    ck_assert(gguf_array_int(gguf_find(gguf, "i8"), 0) == -2);
    ck_assert(gguf_array_int(gguf_find(gguf, "i16"), 0) == -300);
    ck_assert(gguf_array_int(gguf_find(gguf, "u64"), 0) == 1ll << 40);
    ck_assert(gguf_array_int(gguf_find(gguf, "i64"), 0) == -5);
    gguf_close(gguf);
}
END_TEST

START_TEST(an_absent_key_leaves_no_error_text)
{
    struct gguf *gguf = open_writer();
    uint32_t value;
    ck_assert_int_eq(gguf_get_u32(gguf, "absent", &value, &error), STATUS_NOT_FOUND);
    ck_assert_int_eq(error.status, 0);
    ck_assert_str_eq(error.text, "");
    gguf_close(gguf);
}
END_TEST

START_TEST(reads_arrays)
{
    static const char *const words[] = {"one", "", "three"};
    static const int16_t numbers[] = {-1, 2, -300};
    static const double reals[] = {0.5, -2};
    static const uint64_t huge[] = {UINT64_MAX};
    gguf_writer_strings(&writer, "words", words, 3);
    gguf_writer_array(&writer, "numbers", GGUF_I16, numbers, 3, sizeof(numbers));
    gguf_writer_array(&writer, "reals", GGUF_F64, reals, 2, sizeof(reals));
    gguf_writer_array(&writer, "huge", GGUF_U64, huge, 1, sizeof(huge));
    gguf_writer_array(&writer, "none", GGUF_F32, NULL, 0, 0);
    struct gguf *gguf = open_writer();
    const struct gguf_value *value = gguf_find(gguf, "words");
    struct gguf_string word;
    size_t cursor = 0;
    ck_assert(value->is_array && !value->nested && value->kind == GGUF_STRING && value->count == 3);
    for (size_t i = 0; i < 3; i++) {
        ck_assert(gguf_array_next_string(value, &cursor, &word));
        ck_assert_uint_eq(word.length, strlen(words[i]));
        ck_assert_mem_eq(word.bytes, words[i], word.length);
    }
    ck_assert(!gguf_array_next_string(value, &cursor, &word));
    cursor = SIZE_MAX;
    ck_assert(!gguf_array_next_string(value, &cursor, &word));
    value = gguf_find(gguf, "numbers");
    ck_assert(gguf_array_int(value, 0) == -1 && gguf_array_int(value, 2) == -300);
    ck_assert(gguf_array_int(value, 3) == 0 && gguf_array_float(value, 3) == 0);
    ck_assert(gguf_array_float(value, 2) == -300);
    cursor = 0;
    ck_assert(!gguf_array_next_string(value, &cursor, &word));
    value = gguf_find(gguf, "reals");
    ck_assert(gguf_array_float(value, 0) == 0.5 && gguf_array_float(value, 1) == -2);
    ck_assert(gguf_array_int(value, 0) == 0);
    ck_assert(gguf_array_int(gguf_find(gguf, "huge"), 0) == INT64_MAX);
    ck_assert_uint_eq(gguf_find(gguf, "none")->count, 0);
    uint32_t number;
    ck_assert_int_eq(gguf_get_u32(gguf, "huge", &number, &error), STATUS_CORRUPT);
    gguf_close(gguf);
}
END_TEST

START_TEST(steps_over_nested_arrays)
{
    // Two inner arrays: two u16, and one string.
    static const unsigned char inner[] = "\2\0\0\0\2\0\0\0\0\0\0\0\1\0\2\0"
                                         "\10\0\0\0\1\0\0\0\0\0\0\0\2\0\0\0\0\0\0\0hi";
    gguf_writer_array(&writer, "tables", GGUF_ARRAY, inner, 2, sizeof(inner) - 1);
    gguf_writer_u32(&writer, "after", 9);
    struct gguf *gguf = open_writer();
    const struct gguf_value *value = gguf_find(gguf, "tables");
    struct gguf_string string;
    size_t cursor = 0;
    uint32_t after = 0;
    ck_assert(value->nested && value->is_array && value->count == 2);
    ck_assert_uint_eq(value->bytes, sizeof(inner) - 1);
    ck_assert(value->kind != GGUF_ARRAY);
    ck_assert(gguf_array_int(value, 0) == 0 && gguf_array_float(value, 0) == 0);
    ck_assert(!gguf_array_next_string(value, &cursor, &string));
    ck_assert_int_eq(gguf_get_u32(gguf, "after", &after, &error), 0);
    ck_assert_uint_eq(after, 9);
    gguf_close(gguf);
}
END_TEST

START_TEST(places_tensors)
{
    for (uint32_t version = 2; version <= 3; version++) {
        for (uint32_t alignment = 0; alignment <= 4096; alignment = alignment ? alignment * 8 : 8) {
            writer.version = version;
            writer.alignment = alignment;
            gguf_writer_tensor(&writer, "b", TENSOR_Q4_K, 2, (uint64_t[]){256, 3});
            gguf_writer_tensor(&writer, "a", TENSOR_F32, 4, (uint64_t[]){5, 1, 2, 1});
            uint64_t step = alignment ? alignment : 32, second = (3 * 144 + step - 1) / step * step;
            struct gguf *gguf = open_writer();
            const struct gguf_tensor *a = gguf_find_tensor(gguf, "a"), *b = gguf_find_tensor(gguf, "b");
            ck_assert_uint_eq(gguf_version(gguf), version);
            ck_assert_uint_eq(gguf_alignment(gguf), alignment ? alignment : 32);
            ck_assert_uint_eq(gguf_file_bytes(gguf), file_length);
            ck_assert_uint_eq(gguf_part_count(gguf), 1);
            ck_assert_uint_eq(gguf_tensor_count(gguf), 2);
            ck_assert_ptr_eq(gguf_tensor_at(gguf, 0), b);
            ck_assert_ptr_eq(gguf_tensor_at(gguf, 1), a);
            ck_assert_ptr_null(gguf_tensor_at(gguf, 2));
            ck_assert_ptr_null(gguf_find_tensor(gguf, "c"));
            ck_assert_ptr_null(gguf_find_tensor(gguf, ""));
            ck_assert_uint_eq(b->bytes, 3 * 144);
            ck_assert_uint_eq(a->bytes, 40);
            ck_assert(a->dims[0] == 5 && a->dims[1] == 1 && a->dims[2] == 2 && a->dims[3] == 1);
            ck_assert(b->dims[2] == 1 && b->dims[3] == 1 && b->n_dims == 2);
            ck_assert_uint_eq(b->offset % gguf_alignment(gguf), 0);
            ck_assert_uint_eq(a->offset - b->offset, second);
            ck_assert_ptr_eq(gguf_tensor_data(gguf, a), file + a->offset);
            gguf_tensor_release(gguf, a);
            gguf_close(gguf);
            free(file);
            file = NULL;
        }
    }
}
END_TEST

START_TEST(finds_among_many)
{
    char name[32];
    for (int i = 0; i < 500; i++) {
        snprintf(name, sizeof(name), "key.%d", i * 7919 % 500);
        gguf_writer_u32(&writer, name, (uint32_t)(i * 7919 % 500));
        gguf_writer_tensor(&writer, name, TENSOR_F32, 1, (uint64_t[]){(uint64_t)(i * 7919 % 500) + 1});
    }
    struct gguf *gguf = open_writer();
    ck_assert_uint_eq(gguf_value_count(gguf), 500);
    ck_assert_ptr_null(gguf_value_at(gguf, 500));
    for (int i = 0; i < 500; i++) {
        uint32_t value;
        snprintf(name, sizeof(name), "key.%d", i);
        ck_assert_int_eq(gguf_get_u32(gguf, name, &value, &error), 0);
        ck_assert_uint_eq(value, (uint32_t)i);
        ck_assert_uint_eq(gguf_find_tensor(gguf, name)->dims[0], (uint64_t)i + 1);
    }
    ck_assert_ptr_null(gguf_find(gguf, "key."));
    ck_assert_ptr_null(gguf_find(gguf, "key.10 "));
    gguf_close(gguf);
}
END_TEST

START_TEST(opens_a_file_without_tensors)
{
    gguf_writer_string(&writer, "tokenizer.ggml.model", "gpt2");
    struct gguf *gguf = open_writer();
    ck_assert_uint_eq(gguf_tensor_count(gguf), 0);
    gguf_close(gguf);
    // The same cut right behind the last value: no padding is promised where no data follows.
    while (file[file_length - 1] == 0)
        file_length--;
    gguf_close(open_bytes());
}
END_TEST

START_TEST(fingerprint_follows_header_and_size)
{
    gguf_writer_u32(&writer, "a", 1);
    gguf_writer_tensor(&writer, "t", TENSOR_F32, 1, (uint64_t[]){8});
    struct gguf *gguf = open_writer();
    uint64_t first = gguf_fingerprint(gguf);
    gguf_close(gguf);
    file[file_length - 1] ^= 1; // a tensor's byte
    gguf = open_bytes();
    ck_assert_uint_eq(gguf_fingerprint(gguf), first);
    gguf_close(gguf);
    file = realloc(file, file_length + 1);
    file[file_length++] = 0;
    gguf = open_bytes();
    ck_assert_uint_ne(gguf_fingerprint(gguf), first);
    gguf_close(gguf);
    file_length--;
    file[24 + 8 + 1 + 4] ^= 2; // the value of a
    gguf = open_bytes();
    ck_assert_uint_ne(gguf_fingerprint(gguf), first);
    gguf_close(gguf);
}
END_TEST

// --- what is refused ---

START_TEST(refuses_what_is_no_gguf)
{
    static const struct {
        const char *bytes, *says;
    } cases[] = {{"", "empty"},
                 {"GGU", "not a GGUF file"},
                 {"PK\3\4 something else altogether", "not a GGUF file"},
                 {"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"},
                 {"GGUF", "ends inside its header"}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        file = (unsigned char *)strdup(cases[i].bytes);
        file_length = strlen(cases[i].bytes);
        refuse_bytes(STATUS_CORRUPT, cases[i].says);
        free(file);
        file = NULL;
    }
}
END_TEST

START_TEST(refuses_other_versions)
{
    static const struct {
        uint32_t version;
        const char *says;
    } cases[] = {{1, "version 1"}, {4, "version 4"}, {0x03000000, "big-endian"}, {0x02000000, "big-endian"}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        writer.version = cases[i].version;
        refuse_writer(STATUS_UNSUPPORTED, cases[i].says);
    }
}
END_TEST

START_TEST(refuses_absurd_counts)
{
    file = gguf_writer_finish(&writer, &file_length);
    static const struct {
        size_t at;
        uint64_t count;
        const char *says;
    } cases[] = {{8, UINT64_MAX, "18446744073709551615 tensors, the limit is 1048576"},
                 {8, MAX_TENSORS, "1048576 tensors, more than the file has room for"},
                 {8, 1, "1 tensors, more than"},
                 {16, 1ull << 40, "metadata values, the limit is"},
                 {16, MAX_METADATA, "metadata values, more than"}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        memset(file + 8, 0, 16);
        memcpy(file + cases[i].at, &cases[i].count, 8);
        refuse_bytes(STATUS_CORRUPT, cases[i].says);
    }
}
END_TEST

// Every prefix of a good file that loses part of its last tensor is refused; no read goes outside the prefix,
// which lies in a block of exactly its size for the sanitizer to watch.
START_TEST(refuses_every_truncation)
{
    static const unsigned char inner[] = "\7\0\0\0\2\0\0\0\0\0\0\0\1\0";
    static const char *const words[] = {"a", "bc"};
    gguf_writer_strings(&writer, "words", words, 2);
    gguf_writer_array(&writer, "nested", GGUF_ARRAY, inner, 1, sizeof(inner) - 1);
    gguf_writer_u32(&writer, "n", 1);
    gguf_writer_tensor(&writer, "t", TENSOR_Q8_0, 2, (uint64_t[]){32, 2});
    gguf_writer_tensor(&writer, "u", TENSOR_F32, 1, (uint64_t[]){8});
    unsigned char *whole = gguf_writer_finish(&writer, &file_length);
    size_t length = file_length;
    for (file_length = 0; file_length < length; file_length++) {
        file = malloc(file_length + 1);
        memcpy(file, whole, file_length);
        file = realloc(file, file_length ? file_length : 1);
        refuse_bytes(STATUS_CORRUPT, "");
        ck_assert(strlen(error.text) > 10);
        free(file);
    }
    file = whole;
    gguf_close(open_bytes());
}
END_TEST

START_TEST(refuses_duplicates)
{
    gguf_writer_u32(&writer, "twice.told", 1);
    gguf_writer_u32(&writer, "other", 1);
    gguf_writer_u32(&writer, "twice.told", 2);
    refuse_writer(STATUS_CORRUPT, "key 'twice.told' appears twice");
    gguf_writer_tensor(&writer, "blk.0.x", TENSOR_F32, 1, (uint64_t[]){1});
    gguf_writer_tensor(&writer, "blk.0.x", TENSOR_F32, 1, (uint64_t[]){1});
    refuse_writer(STATUS_CORRUPT, "tensor 'blk.0.x' appears twice");
}
END_TEST

START_TEST(refuses_bad_values)
{
    gguf_writer_raw(&writer, "odd", 13, "\0\0\0\0\0\0\0\0", 8);
    refuse_writer(STATUS_CORRUPT, "'odd' has a value of unknown type 13");
    gguf_writer_array(&writer, "odd", (enum gguf_kind)99, "\0\0\0\0", 1, 4);
    refuse_writer(STATUS_CORRUPT, "'odd' has a value of unknown type 99");
    gguf_writer_raw(&writer, "maybe", GGUF_BOOL, "\2", 1);
    refuse_writer(STATUS_CORRUPT, "'maybe' has a boolean");
    gguf_writer_array(&writer, "long", GGUF_U64, "12345678", UINT64_MAX / 4, 8);
    refuse_writer(STATUS_CORRUPT, "inside the value of key 'long'");
    gguf_writer_array(&writer, "many", GGUF_STRING, "\0\0\0\0\0\0\0\0", UINT64_MAX, 8);
    refuse_writer(STATUS_CORRUPT, "inside the value of key 'many'");
    gguf_writer_raw(&writer, "text", GGUF_STRING, "\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF", 8);
    refuse_writer(STATUS_CORRUPT, "inside the value of key 'text'");
    gguf_writer_u32(&writer, "", 1);
    refuse_writer(STATUS_CORRUPT, "name of 0 bytes");
    char *key = malloc(70001);
    memset(key, 'k', 70000);
    key[70000] = '\0';
    gguf_writer_u32(&writer, key, 1);
    free(key);
    refuse_writer(STATUS_CORRUPT, "name of 70000 bytes");
}
END_TEST

START_TEST(refuses_deep_nesting)
{
    unsigned char inner[12 * 40];
    for (size_t i = 0; i < 40; i++)
        memcpy(inner + 12 * i, "\11\0\0\0\1\0\0\0\0\0\0\0", 12);
    gguf_writer_array(&writer, "deep", GGUF_ARRAY, inner, 1, sizeof(inner));
    refuse_writer(STATUS_CORRUPT, "'deep' nests arrays deeper");
}
END_TEST

START_TEST(refuses_bad_alignment)
{
    gguf_writer_u32(&writer, "general.alignment", 24);
    refuse_writer(STATUS_CORRUPT, "general.alignment is not a power of two");
    gguf_writer_u32(&writer, "general.alignment", 0);
    refuse_writer(STATUS_CORRUPT, "general.alignment");
    gguf_writer_string(&writer, "general.alignment", "32");
    refuse_writer(STATUS_CORRUPT, "general.alignment");
}
END_TEST

START_TEST(refuses_bad_tensors)
{
    static const struct {
        uint32_t type, n_dims;
        uint64_t dims[5];
        uint64_t offset;
        int status;
        const char *says;
    } cases[] = {
        {16, 2, {256, 1}, 0, STATUS_UNSUPPORTED, "tensor 'blk.0.bad' has type IQ2_XXS"},
        {39, 2, {256, 1}, 0, STATUS_UNSUPPORTED, "tensor 'blk.0.bad' has type MXFP4"},
        {4, 2, {256, 1}, 0, STATUS_UNSUPPORTED, "tensor 'blk.0.bad' has type Q4_2"},
        {12345, 2, {256, 1}, 0, STATUS_UNSUPPORTED, "'blk.0.bad' has the unknown type number 12345"},
        {TENSOR_F32, 0, {0}, 0, STATUS_CORRUPT, "'blk.0.bad' has 0 dimensions"},
        {TENSOR_F32, 5, {1, 1, 1, 1, 1}, 0, STATUS_CORRUPT, "'blk.0.bad' has 5 dimensions"},
        {TENSOR_F32, 2, {4, 0}, 0, STATUS_CORRUPT, "'blk.0.bad' has a dimension of 0"},
        {TENSOR_Q4_K, 2, {128, 4}, 0, STATUS_CORRUPT, "rows of 128 weights"},
        {TENSOR_F32, 2, {1ull << 40, 1ull << 40}, 0, STATUS_CORRUPT, "'blk.0.bad' overflows"},
        {TENSOR_F32, 3, {1, 1ull << 40, 1ull << 40}, 0, STATUS_CORRUPT, "'blk.0.bad' overflows"},
        {TENSOR_F32, 1, {1ull << 62}, 0, STATUS_CORRUPT, "'blk.0.bad' overflows"},
        {TENSOR_F32, 1, {8}, 16, STATUS_CORRUPT, "offset 16, not a multiple of the alignment 32"},
        {TENSOR_F32, 1, {8}, 64, STATUS_CORRUPT, "beyond the end of the file"},
        {TENSOR_F32, 1, {17}, 0, STATUS_CORRUPT, "beyond the end of the file"},
        {TENSOR_F32, 1, {8}, 0ull - 32, STATUS_CORRUPT, "beyond the end of the file"},
        {TENSOR_F32, 1, {8}, 0, STATUS_CORRUPT, "tensors 'good' and 'blk.0.bad' overlap"},
        {TENSOR_F32, 1, {8}, 32, STATUS_CORRUPT, "tensors 'good' and 'blk.0.bad' overlap"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        if (strstr(cases[i].says, "overlap"))
            gguf_writer_tensor_at(&writer, "good", TENSOR_F32, 1, (uint64_t[]){16}, 0);
        gguf_writer_tensor_at(&writer, "blk.0.bad", cases[i].type, cases[i].n_dims, cases[i].dims,
                              cases[i].offset);
        writer.data.data = calloc(1, writer.data.length = 64);
        refuse_writer(cases[i].status, cases[i].says);
    }
}
END_TEST

START_TEST(sentences_are_fit_for_a_terminal)
{
    char name[200];
    memset(name, 'n', sizeof(name));
    memcpy(name, "\x1b[2J\n", 5);
    name[199] = '\0';
    gguf_writer_tensor_at(&writer, name, 999, 1, (uint64_t[]){1}, 0);
    file = gguf_writer_finish(&writer, &file_length);
    refuse_bytes(STATUS_UNSUPPORTED, "'?[2J?nnnnnnnn");
    ck_assert_ptr_null(strpbrk(error.text, "\x1b\n"));
    ck_assert_ptr_nonnull(strstr(error.text, "nnn...'"));
}
END_TEST

// --- files ---

START_TEST(maps_a_file_without_reading_tensors)
{
    enum { WEIGHTS = 1 << 22 };
    char path[256];
    path_of(path, sizeof(path), "model.gguf");
    gguf_writer_tensor_at(&writer, "big", TENSOR_F32, 1, (uint64_t[]){WEIGHTS}, 0);
    gguf_writer_save(&writer, path);
    struct stat info;
    ck_assert_int_eq(stat(path, &info), 0);
    ck_assert_int_eq(truncate(path, info.st_size + WEIGHTS * 4), 0); // a hole: reading would bring pages in
    struct gguf *gguf = NULL;
    ck_assert_msg(gguf_open(&gguf, path, &error) == 0, "%s", error.text);
    ck_assert_str_eq(gguf_path(gguf), path);
    const struct gguf_tensor *big = gguf_find_tensor(gguf, "big");
    const unsigned char *data = gguf_tensor_data(gguf, big);
    static unsigned char present[WEIGHTS * 4 / 4096 + 2];
    unsigned char *base = (unsigned char *)((uintptr_t)data & ~(uintptr_t)4095);
    ck_assert_int_eq(mincore(base, big->bytes, present), 0);
    size_t pages = 0;
    for (size_t i = 0; i < big->bytes / 4096; i++)
        pages += present[i] & 1;
    ck_assert_msg(pages < 256, "%zu pages of the tensor were brought in", pages);
    ck_assert_int_eq(data[0] | data[big->bytes - 1], 0);
    gguf_tensor_release(gguf, big);
    ck_assert_int_eq(data[0] | data[big->bytes - 1], 0); // still readable
    gguf_close(gguf);
}
END_TEST

START_TEST(refuses_what_cannot_be_opened)
{
    char path[256];
    refuse_file("absent.gguf", STATUS_NOT_FOUND, "No such file");
    refuse_file("", STATUS_INVALID, "not a regular file");
    path_of(path, sizeof(path), "fifo");
    ck_assert_int_eq(mkfifo(path, 0600), 0);
    refuse_file("fifo", STATUS_INVALID, "not a regular file");
    path_of(path, sizeof(path), "empty");
    close(open(path, O_CREAT | O_WRONLY, 0600));
    refuse_file("empty", STATUS_CORRUPT, "empty");
}
END_TEST

static void save_part(const char *name, uint32_t number, uint32_t count, uint32_t total, const char *tensor)
{
    char path[256];
    path_of(path, sizeof(path), name);
    gguf_writer_raw(&writer, "split.no", GGUF_U16, &(uint16_t){(uint16_t)number}, 2);
    gguf_writer_raw(&writer, "split.count", GGUF_U16, &(uint16_t){(uint16_t)count}, 2);
    gguf_writer_raw(&writer, "split.tensors.count", GGUF_I32, &(int32_t){(int32_t)total}, 4);
    if (number == 0)
        gguf_writer_string(&writer, "general.name", "split");
    if (tensor)
        gguf_writer_tensor(&writer, tensor, TENSOR_F32, 1, (uint64_t[]){8});
    gguf_writer_save(&writer, path);
}

START_TEST(opens_a_split_model_by_any_part)
{
    save_part("m-00001-of-00003.gguf", 0, 3, 2, NULL);
    save_part("m-00002-of-00003.gguf", 1, 3, 2, "a");
    writer.alignment = 64;
    save_part("m-00003-of-00003.gguf", 2, 3, 2, "b");
    uint64_t fingerprint = 0;
    for (int i = 1; i <= 3; i++) {
        char path[256];
        struct gguf *gguf = NULL;
        struct gguf_string name;
        snprintf(path, sizeof(path), "%s/m-0000%d-of-00003.gguf", folder, i);
        ck_assert_msg(gguf_open(&gguf, path, &error) == 0, "%s", error.text);
        ck_assert_uint_eq(gguf_part_count(gguf), 3);
        ck_assert_uint_eq(gguf_tensor_count(gguf), 2);
        ck_assert_uint_eq(gguf_find_tensor(gguf, "a")->part, 1);
        ck_assert_uint_eq(gguf_find_tensor(gguf, "b")->part, 2);
        ck_assert_uint_eq(gguf_find_tensor(gguf, "b")->offset % 64, 0);
        ck_assert_int_eq(*(const char *)gguf_tensor_data(gguf, gguf_find_tensor(gguf, "b")), 0);
        ck_assert_int_eq(gguf_get_string(gguf, "general.name", &name, &error), 0);
        if (i > 1)
            ck_assert_uint_eq(gguf_fingerprint(gguf), fingerprint);
        fingerprint = gguf_fingerprint(gguf);
        gguf_close(gguf);
    }
}
END_TEST

START_TEST(refuses_broken_splits)
{
    save_part("lone.gguf", 0, 2, 1, "a");
    refuse_file("lone.gguf", STATUS_INVALID, "does not end in -00001-of-00002.gguf");
    save_part("gap-00001-of-00002.gguf", 0, 2, 1, "a");
    refuse_file("gap-00001-of-00002.gguf", STATUS_NOT_FOUND, "gap-00002-of-00002.gguf");
    save_part("order-00001-of-00002.gguf", 1, 2, 1, "a");
    save_part("order-00002-of-00002.gguf", 0, 2, 1, "a");
    refuse_file("order-00001-of-00002.gguf", STATUS_CORRUPT,
                "its name says part 1 of 2, its metadata part 2 of 2");
    save_part("same-00001-of-00002.gguf", 0, 2, 2, "a");
    save_part("same-00002-of-00002.gguf", 1, 2, 2, "a");
    refuse_file("same-00001-of-00002.gguf", STATUS_CORRUPT, "tensor 'a' appears twice");
    save_part("few-00001-of-00002.gguf", 0, 2, 3, "a");
    save_part("few-00002-of-00002.gguf", 1, 2, 3, "b");
    refuse_file("few-00002-of-00002.gguf", STATUS_CORRUPT, "hold 2 tensors, split.tensors.count promises 3");
    refuse_file("huge-00001-of-99999.gguf", STATUS_INVALID, "99999 parts");
    refuse_file("zero-00000-of-00002.gguf", STATUS_NOT_FOUND, "zero-00000-of-00002.gguf");
    char path[256];
    path_of(path, sizeof(path), "plain-00001-of-00002.gguf");
    gguf_writer_save(&writer, path);
    refuse_file("plain-00001-of-00002.gguf", STATUS_CORRUPT, "its metadata part 1 of 1");
    path_of(path, sizeof(path), "single-00001-of-00001.gguf");
    gguf_writer_save(&writer, path);
    struct gguf *gguf;
    ck_assert_int_eq(gguf_open(&gguf, path, &error), 0);
    gguf_close(gguf);
}
END_TEST

START_TEST(close_takes_null)
{
    gguf_close(NULL);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("gguf");
    TCase *good = tcase_create("good"), *bad = tcase_create("bad"), *files = tcase_create("files");
    tcase_add_checked_fixture(good, set_up, tear_down);
    tcase_add_checked_fixture(bad, set_up, tear_down);
    tcase_add_checked_fixture(files, set_up, tear_down);
    tcase_add_test(good, reads_every_scalar);
    tcase_add_test(good, an_absent_key_leaves_no_error_text);
    tcase_add_test(good, reads_arrays);
    tcase_add_test(good, steps_over_nested_arrays);
    tcase_add_test(good, places_tensors);
    tcase_add_test(good, finds_among_many);
    tcase_add_test(good, opens_a_file_without_tensors);
    tcase_add_test(good, fingerprint_follows_header_and_size);
    tcase_add_test(bad, refuses_what_is_no_gguf);
    tcase_add_test(bad, refuses_other_versions);
    tcase_add_test(bad, refuses_absurd_counts);
    tcase_add_test(bad, refuses_every_truncation);
    tcase_add_test(bad, refuses_duplicates);
    tcase_add_test(bad, refuses_bad_values);
    tcase_add_test(bad, refuses_deep_nesting);
    tcase_add_test(bad, refuses_bad_alignment);
    tcase_add_test(bad, refuses_bad_tensors);
    tcase_add_test(bad, sentences_are_fit_for_a_terminal);
    tcase_add_test(files, maps_a_file_without_reading_tensors);
    tcase_add_test(files, refuses_what_cannot_be_opened);
    tcase_add_test(files, opens_a_split_model_by_any_part);
    tcase_add_test(files, refuses_broken_splits);
    tcase_add_test(files, close_takes_null);
    suite_add_tcase(suite, good);
    suite_add_tcase(suite, bad);
    suite_add_tcase(suite, files);
    return suite;
}
