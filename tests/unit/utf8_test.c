// UTF-8 sequences, whole, broken and unfinished.
#include <string.h>

#include "common/utf8.h"
#include "tests/suite.h"

static const struct {
    const char *bytes;
    size_t length;
    enum utf8_kind kind;
    size_t taken;
} cases[] = {
    {"a", 1, UTF8_WHOLE, 1},
    {"\0", 1, UTF8_WHOLE, 1},
    {"\x7F", 1, UTF8_WHOLE, 1},
    {"\xC3\xA9x", 3, UTF8_WHOLE, 2},
    {"\xE2\x82\xAC", 3, UTF8_WHOLE, 3},
    {"\xED\x9F\xBF", 3, UTF8_WHOLE, 3},
    {"\xEE\x80\x80", 3, UTF8_WHOLE, 3},
    {"\xF0\x9F\x98\x80", 4, UTF8_WHOLE, 4},
    {"\xF4\x8F\xBF\xBF", 4, UTF8_WHOLE, 4},
    {"\x80", 1, UTF8_BROKEN, 1},
    {"\xBF\xBF", 2, UTF8_BROKEN, 1},
    {"\xC0\xAF", 2, UTF8_BROKEN, 1},     // overlong
    {"\xC1\x80", 2, UTF8_BROKEN, 1},     // overlong
    {"\xE0\x80\x80", 3, UTF8_BROKEN, 1}, // overlong
    {"\xE0\x9F\xBF", 3, UTF8_BROKEN, 1}, // overlong
    {"\xF0\x8F\xBF\xBF", 4, UTF8_BROKEN, 1},
    {"\xED\xA0\x80", 3, UTF8_BROKEN, 1},     // a surrogate
    {"\xF4\x90\x80\x80", 4, UTF8_BROKEN, 1}, // above U+10FFFF
    {"\xF5\x80\x80\x80", 4, UTF8_BROKEN, 1},
    {"\xFE", 1, UTF8_BROKEN, 1},
    {"\xFF\xFF", 2, UTF8_BROKEN, 1},
    {"\xC3"
     "a",
     2, UTF8_BROKEN, 1},
    {"\xE2\x82"
     "a",
     3, UTF8_BROKEN, 2},
    {"\xF0\x9F\x98"
     "a",
     4, UTF8_BROKEN, 3},
    {"\xF0\x9F\xF0", 3, UTF8_BROKEN, 2},
    {"\xC3", 1, UTF8_PARTIAL, 1},
    {"\xE2", 1, UTF8_PARTIAL, 1},
    {"\xE2\x82", 2, UTF8_PARTIAL, 2},
    {"\xF0\x9F\x98", 3, UTF8_PARTIAL, 3},
};

START_TEST(a_sequence_is_told_apart)
{
    size_t taken = 99;
    ck_assert_int_eq(utf8_scan(cases[_i].bytes, cases[_i].length, &taken), cases[_i].kind);
    ck_assert_uint_eq(taken, cases[_i].taken);
}
END_TEST

START_TEST(every_character_is_whole)
{
    unsigned count = 0;
    for (unsigned c = 0; c < 0x200000; c++) {
        unsigned char bytes[4] = {0xF0 | c >> 18, 0x80 | (c >> 12 & 0x3F), 0x80 | (c >> 6 & 0x3F),
                                  0x80 | (c & 0x3F)};
        size_t taken;
        count += utf8_scan(bytes, 4, &taken) == UTF8_WHOLE && taken == 4;
    }
    ck_assert_uint_eq(count, 0x100000);
}
END_TEST

START_TEST(the_valid_part_ends_where_it_should)
{
    static const char text[] = "sixteen letters, caf\xC3\xA9 \xE2\x82\xAC and more of them";
    ck_assert_uint_eq(utf8_valid_prefix(text, sizeof(text) - 1), sizeof(text) - 1);
    for (size_t broken = 0; broken < sizeof(text) - 1; broken++) {
        char copy[sizeof(text)];
        memcpy(copy, text, sizeof(text));
        copy[broken] = (char)0xFF;
        size_t good = broken;
        while (good > 0 && ((unsigned char)text[good] & 0xC0) == 0x80)
            good--;
        ck_assert_uint_eq(utf8_valid_prefix(copy, sizeof(text) - 1), good);
    }
    ck_assert_uint_eq(utf8_valid_prefix("", 0), 0);
    ck_assert_uint_eq(utf8_valid_prefix("ab\xE2\x82", 4), 2);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("utf8");
    TCase *tests = tcase_create("utf8");
    tcase_add_loop_test(tests, a_sequence_is_told_apart, 0, (int)(sizeof(cases) / sizeof(cases[0])));
    tcase_add_test(tests, every_character_is_whole);
    tcase_add_test(tests, the_valid_part_ends_where_it_should);
    suite_add_tcase(suite, tests);
    return suite;
}
