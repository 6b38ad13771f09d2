// The small things everything else stands on: failure sentences, arena, queue, log lines, tensor types,
// clock, clean text.
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/arena.h"
#include "common/clock.h"
#include "common/log.h"
#include "common/queue.h"
#include "common/status.h"
#include "common/tensor_type.h"
#include "common/utf8.h"
#include "tests/suite.h"

// --- status ---

START_TEST(error_keeps_status_and_text)
{
    struct error error = {0};
    ck_assert_int_eq(error_set(&error, STATUS_IO, "cannot open %s", "x"), STATUS_IO);
    ck_assert_int_eq(error.status, STATUS_IO);
    ck_assert_str_eq(error.text, "cannot open x");
    ck_assert_int_eq(error_wrap(&error, "model %d", 3), STATUS_IO);
    ck_assert_str_eq(error.text, "model 3: cannot open x");
    error_set(&error, STATUS_INVALID, "again: %s", error.text); // its own text as an argument
    ck_assert_str_eq(error.text, "again: model 3: cannot open x");
    ck_assert_int_eq(error_set(NULL, STATUS_IO, "nobody listens"), STATUS_IO);
    ck_assert_int_eq(error_wrap(NULL, "nobody listens"), STATUS_INTERNAL);
}
END_TEST

START_TEST(error_is_cut_at_a_character)
{
    struct error error;
    char text[600];
    for (size_t shift = 0; shift < 3; shift++) {
        memset(text, 'x', sizeof(text));
        for (size_t i = shift; i + 3 < sizeof(text); i += 3)
            memcpy(text + i, "\xE2\x82\xAC", 3);
        text[sizeof(text) - 1] = '\0';
        error_set(&error, STATUS_IO, "%s", text);
        size_t length = strlen(error.text);
        ck_assert(length < sizeof(error.text) && length > sizeof(error.text) - 4);
        ck_assert_uint_eq(utf8_valid_prefix(error.text, length), length);
        error_wrap(&error, "a prefix of %s", "eight");
        ck_assert_uint_eq(utf8_valid_prefix(error.text, strlen(error.text)), strlen(error.text));
        ck_assert_ptr_eq(strstr(error.text, "a prefix of eight: "), error.text);
    }
}
END_TEST

START_TEST(every_status_has_a_name)
{
    for (int i = 0; i >= STATUS_UNAUTHENTICATED; i--)
        ck_assert_str_ne(status_name(i), "unknown status");
    ck_assert_str_eq(status_name(1), "unknown status");
    ck_assert_str_eq(status_name(-99), "unknown status");
}
END_TEST

// --- arena ---

static bool all_are(const unsigned char *bytes, size_t length, unsigned char value)
{
    for (size_t i = 0; i < length; i++)
        if (bytes[i] != value)
            return false;
    return true;
}

START_TEST(arena_gives_zeroed_aligned_memory)
{
    struct arena arena = {0};
    unsigned char *kept[300];
    size_t size[300];
    for (size_t i = 0; i < 300; i++) {
        size[i] = i * i % 5000 + (i == 200 ? 3 << 20 : 0);
        kept[i] = arena_alloc(&arena, size[i], 1);
        ck_assert_ptr_nonnull(kept[i]);
        ck_assert_uint_eq((uintptr_t)kept[i] % 16, 0);
        ck_assert(all_are(kept[i], size[i], 0));
        memset(kept[i], (int)(i & 0xFF), size[i]);
    }
    for (size_t i = 0; i < 300; i++) // nobody wrote into a neighbour
        ck_assert(all_are(kept[i], size[i], (unsigned char)i));
    ck_assert_uint_ge(arena.total, 3 << 20);
    arena_reset(&arena);
    ck_assert_uint_eq(arena.total, 0);
    unsigned char *again = arena_alloc(&arena, 4000, 1);
    ck_assert(all_are(again, 4000, 0));
    arena_free(&arena);
    arena_free(&arena);
    ck_assert_ptr_null(arena.blocks);
}
END_TEST

START_TEST(arena_refuses_overflow)
{
    struct arena arena = {0};
    ck_assert_ptr_null(arena_alloc(&arena, SIZE_MAX, 2));
    ck_assert_ptr_null(arena_alloc(&arena, SIZE_MAX / 2, 1));
    ck_assert_ptr_null(arena_alloc(&arena, 2, SIZE_MAX));
    ck_assert_ptr_null(arena_copy(&arena, "", SIZE_MAX));
    ck_assert_ptr_nonnull(arena_alloc(&arena, 0, 8));
    ck_assert_str_eq(arena_copy(&arena, "hello", 4), "hell");
    ck_assert_str_eq(arena_copy(&arena, NULL, 0), "");
    arena_free(&arena);
}
END_TEST

// --- queue ---

START_TEST(queue_is_first_in_first_out_and_bounded)
{
    struct queue *queue;
    ck_assert_int_eq(queue_new(&queue, sizeof(int), 3), 0);
    int out = -1;
    for (int round = 0; round < 5; round++) {
        for (int i = 0; i < 3; i++)
            ck_assert_int_eq(queue_try_push(queue, &(int){round * 10 + i}), 0);
        ck_assert_int_eq(queue_try_push(queue, &(int){99}), STATUS_EXHAUSTED);
        ck_assert_uint_eq(queue_count(queue), 3);
        for (int i = 0; i < 3; i++) {
            ck_assert_int_eq(queue_pop(queue, &out, i - 1), 0);
            ck_assert_int_eq(out, round * 10 + i);
        }
        // One more step, so that the next round begins elsewhere in the ring.
        ck_assert_int_eq(queue_push(queue, &round), 0);
        ck_assert_int_eq(queue_pop(queue, &out, -1), 0);
    }
    ck_assert_int_eq(queue_pop(queue, &out, 0), STATUS_DEADLINE);
    queue_free(queue);
    queue_free(NULL);
}
END_TEST

START_TEST(queue_refuses_what_cannot_be)
{
    struct queue *queue = NULL;
    ck_assert_int_eq(queue_new(&queue, 8, 0), STATUS_INVALID);
    ck_assert_int_eq(queue_new(&queue, SIZE_MAX / 2, 3), STATUS_INVALID);
    ck_assert_int_eq(queue_new(&queue, SIZE_MAX, 1), STATUS_INVALID);
    ck_assert_ptr_null(queue);
}
END_TEST

START_TEST(queue_waits_as_long_as_told)
{
    struct queue *queue;
    int out;
    ck_assert_int_eq(queue_new(&queue, sizeof(int), 1), 0);
    int64_t start = clock_now_us();
    ck_assert_int_eq(queue_pop(queue, &out, 30000), STATUS_DEADLINE);
    int64_t waited = clock_now_us() - start;
    ck_assert_msg(waited >= 30000, "waited %lld us", (long long)waited);
    queue_free(queue);
}
END_TEST

START_TEST(queue_drains_after_close)
{
    struct queue *queue;
    int out = 0;
    ck_assert_int_eq(queue_new(&queue, sizeof(int), 2), 0);
    ck_assert_int_eq(queue_push(queue, &(int){7}), 0);
    queue_close(queue);
    ck_assert_int_eq(queue_push(queue, &(int){8}), STATUS_UNAVAILABLE);
    ck_assert_int_eq(queue_try_push(queue, &(int){8}), STATUS_UNAVAILABLE);
    ck_assert_int_eq(queue_pop(queue, &out, -1), 0);
    ck_assert_int_eq(out, 7);
    ck_assert_int_eq(queue_pop(queue, &out, -1), STATUS_UNAVAILABLE);
    queue_close(queue);
    queue_free(queue);
}
END_TEST

static void *push_after_a_while(void *context)
{
    clock_sleep_us(20000);
    ck_assert_int_eq(queue_push(context, &(int){5}), 0);
    return NULL;
}

static void *close_after_a_while(void *context)
{
    clock_sleep_us(20000);
    queue_close(context);
    return NULL;
}

START_TEST(queue_wakes_those_who_wait)
{
    struct queue *queue;
    pthread_t thread;
    int out = 0;
    ck_assert_int_eq(queue_new(&queue, sizeof(int), 1), 0);
    pthread_create(&thread, NULL, push_after_a_while, queue);
    ck_assert_int_eq(queue_pop(queue, &out, -1), 0);
    ck_assert_int_eq(out, 5);
    pthread_join(thread, NULL);
    pthread_create(&thread, NULL, close_after_a_while, queue);
    ck_assert_int_eq(queue_pop(queue, &out, -1), STATUS_UNAVAILABLE);
    pthread_join(thread, NULL);
    queue_free(queue);
    // A producer that waits for room is woken by a close as well.
    ck_assert_int_eq(queue_new(&queue, sizeof(int), 1), 0);
    ck_assert_int_eq(queue_push(queue, &(int){1}), 0);
    pthread_create(&thread, NULL, close_after_a_while, queue);
    ck_assert_int_eq(queue_push(queue, &(int){2}), STATUS_UNAVAILABLE);
    pthread_join(thread, NULL);
    queue_free(queue);
}
END_TEST

enum { PRODUCERS = 4, CONSUMERS = 3, RECORDS = 2000 };
struct record {
    uint32_t producer, number;
};
struct crowd {
    struct queue *queue;
    uint32_t producer;
    uint64_t taken, sum;
    bool ordered;
};

static void *produce(void *context)
{
    struct crowd *own = context;
    for (uint32_t i = 1; i <= RECORDS; i++)
        if (queue_push(own->queue, &(struct record){own->producer, i}) != 0)
            return NULL;
    return own;
}

static void *consume(void *context)
{
    struct crowd *own = context;
    struct record record;
    uint32_t last[PRODUCERS] = {0};
    own->ordered = true;
    while (queue_pop(own->queue, &record, -1) == 0) {
        own->ordered = own->ordered && record.number > last[record.producer];
        last[record.producer] = record.number;
        own->taken++;
        own->sum += record.number;
    }
    return NULL;
}

START_TEST(queue_loses_nothing_in_a_crowd)
{
    struct queue *queue;
    pthread_t threads[PRODUCERS + CONSUMERS];
    struct crowd crowd[PRODUCERS + CONSUMERS] = {0};
    ck_assert_int_eq(queue_new(&queue, sizeof(struct record), 5), 0);
    for (uint32_t i = 0; i < PRODUCERS + CONSUMERS; i++) {
        crowd[i] = (struct crowd){.queue = queue, .producer = i};
        pthread_create(&threads[i], NULL, i < PRODUCERS ? produce : consume, &crowd[i]);
    }
    for (uint32_t i = 0; i < PRODUCERS; i++) {
        void *done;
        pthread_join(threads[i], &done);
        ck_assert_ptr_eq(done, &crowd[i]);
    }
    queue_close(queue);
    uint64_t taken = 0, sum = 0;
    for (uint32_t i = PRODUCERS; i < PRODUCERS + CONSUMERS; i++) {
        pthread_join(threads[i], NULL);
        ck_assert(crowd[i].ordered);
        taken += crowd[i].taken;
        sum += crowd[i].sum;
    }
    ck_assert_uint_eq(taken, PRODUCERS * RECORDS);
    ck_assert_uint_eq(sum, (uint64_t)PRODUCERS * RECORDS * (RECORDS + 1) / 2);
    queue_free(queue);
}
END_TEST

// --- log ---

// What log_write writes to standard error while `level` is the least level shown.
static void logged(char *out, size_t capacity, int json, enum log_level least, enum log_level level,
                   const char *text)
{
    int ends[2], before = dup(STDERR_FILENO);
    ck_assert_int_eq(pipe(ends), 0);
    fcntl(ends[0], F_SETFL, O_NONBLOCK);
    dup2(ends[1], STDERR_FILENO);
    log_init("worker \"2\"", least, json);
    errno = ENOTTY;
    log_write(level, "%s", text);
    int kept = errno;
    dup2(before, STDERR_FILENO);
    ssize_t length = read(ends[0], out, capacity - 1);
    out[length > 0 ? length : 0] = '\0';
    close(ends[0]);
    close(ends[1]);
    close(before);
    ck_assert_int_eq(kept, ENOTTY);
}

START_TEST(log_lines_have_their_form)
{
    char line[4096];
    logged(line, sizeof(line), 0, LOG_INFO, LOG_WARN, "say \"hi\"");
    ck_assert_uint_eq(strlen("2026-01-31T12:00:00.123Z"), strcspn(line, " "));
    ck_assert(line[4] == '-' && line[10] == 'T' && line[19] == '.' && line[23] == 'Z');
    ck_assert_str_eq(strchr(line, ' '), " WARN worker \"2\": say \"hi\"\n");
    logged(line, sizeof(line), 1, LOG_INFO, LOG_ERROR, "say \"hi\" \\");
    ck_assert_ptr_eq(strstr(line, "{\"time\":\""), line);
    ck_assert_str_eq(strstr(line, "\"level\""),
                     "\"level\":\"ERROR\",\"who\":\"worker \\\"2\\\"\",\"text\":\"say \\\"hi\\\" \\\\\"}\n");
}
END_TEST

START_TEST(log_lines_cannot_be_forged)
{
    char line[4096];
    logged(line, sizeof(line), 0, LOG_INFO, LOG_INFO, "a\nb\x1b[2J\x7f \xC2\x9B \xFF\xC3 \xE2\x82\xAC");
    ck_assert_str_eq(strstr(line, ": ") + 2,
                     "a\\x0ab\\x1b[2J\\x7f \\u009b \xEF\xBF\xBD\xEF\xBF\xBD \xE2\x82\xAC\n");
    logged(line, sizeof(line), 1, LOG_INFO, LOG_INFO, "a\nb\xFF");
    ck_assert_str_eq(strstr(line, "\"text\""), "\"text\":\"a\\u000ab\xEF\xBF\xBD\"}\n");
}
END_TEST

START_TEST(log_lines_are_bounded)
{
    char line[4096], text[3000];
    memset(text, '\1', sizeof(text));
    text[sizeof(text) - 1] = '\0';
    for (int json = 0; json < 2; json++) {
        logged(line, sizeof(line), json, LOG_INFO, LOG_INFO, text);
        size_t length = strlen(line);
        ck_assert(length < 2304 && line[length - 1] == '\n');
        ck_assert(!json || line[length - 2] == '}');
    }
}
END_TEST

START_TEST(log_levels_filter)
{
    char line[4096];
    enum log_level level = LOG_DEBUG;
    logged(line, sizeof(line), 0, LOG_WARN, LOG_INFO, "quiet");
    ck_assert_str_eq(line, "");
    logged(line, sizeof(line), 0, LOG_DEBUG, LOG_DEBUG, "loud");
    ck_assert_str_ne(line, "");
    ck_assert_int_eq(log_level_parse("error", &level), 0);
    ck_assert_int_eq(level, LOG_ERROR);
    ck_assert_int_eq(log_level_parse("INFO", &level), STATUS_INVALID);
    ck_assert_int_eq(level, LOG_ERROR);
}
END_TEST

// --- tensor types ---

START_TEST(tensor_types_are_consistent)
{
    size_t known = 0;
    for (uint32_t type = 0; type < 100; type++) {
        const struct tensor_type_info *info = tensor_type_info(type);
        if (!info)
            continue;
        known++;
        ck_assert_str_eq(info->name, tensor_type_ggml_name(type));
        ck_assert_ptr_nonnull(strstr(tensor_type_list(), info->name));
        ck_assert_uint_eq(tensor_type_bytes(type, 512, 3), 512 / info->block_weights * 3 * info->block_bytes);
        if (info->block_weights > 1)
            ck_assert_uint_eq(tensor_type_bytes(type, 512 + 1, 3), 0);
    }
    ck_assert_uint_eq(known, 13);
    ck_assert_str_eq(tensor_type_ggml_name(16), "IQ2_XXS");
    ck_assert_str_eq(tensor_type_ggml_name(39), "MXFP4");
    ck_assert_ptr_null(tensor_type_ggml_name(77));
    ck_assert_ptr_null(tensor_type_info(UINT32_MAX));
    ck_assert_uint_eq(tensor_type_bytes(9, 32, 1), 0);
    ck_assert_uint_eq(tensor_type_bytes(TENSOR_F32, UINT64_MAX, 1), 0);
    ck_assert_uint_eq(tensor_type_bytes(TENSOR_F32, 1ull << 32, 1ull << 31), 0);
    ck_assert_uint_eq(tensor_type_bytes(TENSOR_Q6_K, 4096, 4096), 4096ull * 16 * 210);
}
END_TEST

// --- clock and text ---

START_TEST(clock_moves_forward)
{
    int64_t start = clock_now_us();
    clock_sleep_us(5000);
    ck_assert_int_ge(clock_now_us() - start, 5000);
    clock_sleep_us(-1);
    ck_assert_int_gt(clock_wall_us(), 1600000000000000); // later than 2020
}
END_TEST

START_TEST(copies_clean_text)
{
    char text[12];
    ck_assert_uint_eq(utf8_copy_clean(text, sizeof(text), "a\n\x7f\xC2\x85\xFF\xE2\x82", 8), 6);
    ck_assert_str_eq(text, "a?????");
    ck_assert_uint_eq(utf8_copy_clean(text, sizeof(text), "\0b", 2), 2);
    ck_assert_str_eq(text, "?b");
    ck_assert_uint_eq(utf8_copy_clean(text, 6, "abc\xE2\x82\xAC", 6), 3);
    ck_assert_str_eq(text, "abc");
    ck_assert_uint_eq(utf8_copy_clean(text, 7, "abc\xE2\x82\xAC", 6), 6);
    ck_assert_str_eq(text, "abc\xE2\x82\xAC");
    ck_assert_uint_eq(utf8_copy_clean(text, 1, "abc", 3), 0);
    ck_assert_str_eq(text, "");
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("basics");
    TCase *all = tcase_create("all");
    tcase_add_test(all, error_keeps_status_and_text);
    tcase_add_test(all, error_is_cut_at_a_character);
    tcase_add_test(all, every_status_has_a_name);
    tcase_add_test(all, arena_gives_zeroed_aligned_memory);
    tcase_add_test(all, arena_refuses_overflow);
    tcase_add_test(all, queue_is_first_in_first_out_and_bounded);
    tcase_add_test(all, queue_refuses_what_cannot_be);
    tcase_add_test(all, queue_waits_as_long_as_told);
    tcase_add_test(all, queue_drains_after_close);
    tcase_add_test(all, queue_wakes_those_who_wait);
    tcase_add_test(all, queue_loses_nothing_in_a_crowd);
    tcase_add_test(all, log_lines_have_their_form);
    tcase_add_test(all, log_lines_cannot_be_forged);
    tcase_add_test(all, log_lines_are_bounded);
    tcase_add_test(all, log_levels_filter);
    tcase_add_test(all, tensor_types_are_consistent);
    tcase_add_test(all, clock_moves_forward);
    tcase_add_test(all, copies_clean_text);
    suite_add_tcase(suite, all);
    return suite;
}
