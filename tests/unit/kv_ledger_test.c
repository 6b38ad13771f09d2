// The KV ledger: reservation, growth, forks, copy-on-write, release; and that its broken preconditions stop
// the process.
#include "coordinator/kv_ledger.h"
#include "tests/suite.h"

#include <signal.h>
#include <stdlib.h>

static struct kv_ledger *ledger_of(uint32_t n_pages)
{
    struct kv_ledger *ledger;
    ck_assert_int_eq(kv_ledger_new(&ledger, n_pages), STATUS_OK);
    return ledger;
}

START_TEST(pages_are_set_aside_before_they_are_taken)
{
    struct kv_ledger *ledger = ledger_of(5);
    uint32_t pages[8];
    struct kv_table table = {.pages = pages, .capacity = 8};
    ck_assert(!kv_ledger_reserve(ledger, 6));
    ck_assert(!kv_ledger_reserve(ledger, UINT64_MAX));
    ck_assert_uint_eq(kv_ledger_available(ledger), 5);
    ck_assert(kv_ledger_reserve(ledger, 3));
    ck_assert(!kv_ledger_reserve(ledger, 3));
    ck_assert_uint_eq(kv_ledger_available(ledger), 2);
    kv_ledger_grow(ledger, &table, 2);
    ck_assert_uint_eq(table.count, 2);
    ck_assert_uint_ne(pages[0], pages[1]);
    ck_assert_uint_eq(kv_ledger_reserved(ledger), 1);
    ck_assert_uint_eq(kv_ledger_available(ledger), 2); // taking what was set aside changes nothing for others
    kv_ledger_unreserve(ledger, 1);
    ck_assert_uint_eq(kv_ledger_available(ledger), 3);
    kv_ledger_release(ledger, &table);
    ck_assert_uint_eq(table.count, 0);
    ck_assert_uint_eq(kv_ledger_available(ledger), 5);
    ck_assert_uint_eq(kv_ledger_total(ledger), 5);
    kv_ledger_free(ledger);
}
END_TEST

START_TEST(every_page_goes_out_once)
{
    enum { PAGES = 100 };
    struct kv_ledger *ledger = ledger_of(PAGES);
    uint32_t pages[PAGES];
    bool seen[PAGES] = {false};
    struct kv_table table = {.pages = pages, .capacity = PAGES};
    ck_assert(kv_ledger_reserve(ledger, PAGES));
    kv_ledger_grow(ledger, &table, PAGES);
    for (uint32_t i = 0; i < PAGES; i++) {
        ck_assert_uint_lt(pages[i], PAGES);
        ck_assert(!seen[pages[i]]);
        seen[pages[i]] = true;
        ck_assert_uint_eq(kv_ledger_references(ledger, i), 1);
    }
    ck_assert(!kv_ledger_reserve(ledger, 1));
    ck_assert(kv_ledger_reserve(ledger, 0));
    kv_ledger_release(ledger, &table);
    ck_assert_uint_eq(kv_ledger_references(ledger, 7), 0);
    kv_ledger_free(ledger);
}
END_TEST

START_TEST(forks_share_until_they_write)
{
    struct kv_ledger *ledger = ledger_of(10);
    uint32_t pages[3][4], copy_from = 99;
    struct kv_table tables[3];
    for (int i = 0; i < 3; i++)
        tables[i] = (struct kv_table){.pages = pages[i], .capacity = 4};
    ck_assert(kv_ledger_reserve(ledger, 6));
    kv_ledger_grow(ledger, &tables[0], 3);
    kv_ledger_share(ledger, &tables[0], &tables[1]);
    kv_ledger_share(ledger, &tables[0], &tables[2]);
    uint32_t original = pages[0][2];
    ck_assert_uint_eq(kv_ledger_references(ledger, original), 3);
    ck_assert_uint_eq(kv_ledger_available(ledger), 4); // a share takes nothing

    ck_assert(kv_ledger_own(ledger, &tables[0], 2, &copy_from)); // the first to write copies, whoever it is
    ck_assert_uint_eq(copy_from, original);
    ck_assert_uint_ne(pages[0][2], original);
    ck_assert_uint_eq(kv_ledger_references(ledger, original), 2);
    ck_assert(kv_ledger_own(ledger, &tables[1], 2, &copy_from));
    ck_assert(!kv_ledger_own(ledger, &tables[2], 2, &copy_from)); // the last keeps it
    ck_assert_uint_eq(pages[2][2], original);
    ck_assert_uint_eq(kv_ledger_reserved(ledger), 1);

    kv_ledger_release(ledger, &tables[0]);
    ck_assert_uint_eq(kv_ledger_references(ledger, pages[1][0]), 2); // the others still read it
    ck_assert_uint_eq(kv_ledger_available(ledger), 5);
    kv_ledger_release(ledger, &tables[2]);
    kv_ledger_release(ledger, &tables[1]);
    ck_assert_uint_eq(kv_ledger_available(ledger), 9);
    kv_ledger_free(ledger);
}
END_TEST

START_TEST(an_empty_ledger_gives_nothing)
{
    struct kv_ledger *ledger = ledger_of(0);
    ck_assert(kv_ledger_reserve(ledger, 0));
    ck_assert(!kv_ledger_reserve(ledger, 1));
    kv_ledger_free(ledger);
    kv_ledger_free(NULL);
}
END_TEST

// Each of these would hand one sequence's page to another.
START_TEST(misuse_ends_the_process)
{
    struct kv_ledger *ledger = ledger_of(4);
    uint32_t pages[2] = {0, 0}, copy_from;
    struct kv_table table = {.pages = pages, .capacity = 2};
    switch (_i) {
    case 0:
        kv_ledger_grow(ledger, &table, 1); // not set aside
        break;
    case 1:
        kv_ledger_unreserve(ledger, 1);
        break;
    case 2:
        table.count = 1;
        kv_ledger_release(ledger, &table); // page 0 is free
        break;
    case 3:
        kv_ledger_reserve(ledger, 4);
        kv_ledger_grow(ledger, &table, 3); // beyond the table
        break;
    case 4:
        kv_ledger_own(ledger, &table, 0, &copy_from);
        break;
    case 5:
        table.count = 1;
        kv_ledger_share(ledger, &table, &table);
        break;
    default:
        kv_ledger_references(ledger, 4);
    }
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("kv_ledger");
    TCase *pages = tcase_create("pages");
    tcase_add_test(pages, pages_are_set_aside_before_they_are_taken);
    tcase_add_test(pages, every_page_goes_out_once);
    tcase_add_test(pages, forks_share_until_they_write);
    tcase_add_test(pages, an_empty_ledger_gives_nothing);
    suite_add_tcase(suite, pages);
    TCase *misuse = tcase_create("misuse");
    tcase_add_loop_test_raise_signal(misuse, misuse_ends_the_process, SIGABRT, 0, 7);
    suite_add_tcase(suite, misuse);
    return suite;
}
