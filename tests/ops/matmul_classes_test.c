// matmul by the classes of its rows (generated tokens, prompt tokens, both in one call), at the shapes of
// real models and at odd ones: right within the bounds of matmul_problem.h; and a row's bits do not depend on
// which others of either class stand beside it. At the best level of the backend under test.
//
// The relative distance (rms) of a whole product from f64, for normal activations: CUDA at most 1e-3; the
// CPU's 8-bit activations at most 2e-2.
#include "tests/ops/matmul_problem.h"

static double distance_allowed(void)
{
    return fixture_on_cuda() ? 1e-3 : 2e-2;
}

static struct device *open_best(void)
{
    return fixture_open(fixture_best_level(), 0);
}

static uint32_t any_width(uint32_t type, uint32_t wanted)
{
    uint32_t block = tensor_type_info(type)->block_weights;
    return (wanted + block - 1) / block * block;
}

static void make_normal(struct problem *p, uint64_t *random)
{
    fixture_state = random_bits(random);
    fixture_normals(p->x, (size_t)p->columns * p->width, 1);
}

// Every count of generated tokens that decode kernels may treat apart, and beyond their group of 64.
START_TEST(test_generated_counts)
{
    enum { MOST = 130 };
    uint64_t random = random_seed("test_generated_counts");
    struct device *device = open_best();
    uint32_t type = WEIGHT_TYPES[_i];
    struct problem p = make_problem(type, 48, any_width(type, 576), MOST, false, &random);
    problem_put(device, &p);
    for (uint32_t count = 1; count <= MOST; count = count < 65 ? count + 1 : count + 65) {
        if (!fixture_is_slow() || count % 13 == 1 || count == 8)
            check_columns(device, &p, count, count);
    }
    problem_drop(device, &p);
    free_problem(&p);
    fixture_close(device);
}
END_TEST

START_TEST(test_prompt_counts)
{
    static const uint32_t COUNTS[] = {1, 2, 17, 64, 333};
    uint64_t random = random_seed("test_prompt_counts");
    struct device *device = open_best();
    uint32_t type = WEIGHT_TYPES[_i];
    struct problem p = make_problem(type, 33, any_width(type, 512), 333, false, &random);
    problem_put(device, &p);
    for (size_t i = 0; i < sizeof COUNTS / sizeof *COUNTS; i++)
        check_columns(device, &p, COUNTS[i], 0);
    check_columns(device, &p, 43, 3);
    check_columns(device, &p, 200, 65);
    problem_drop(device, &p);
    free_problem(&p);
    fixture_close(device);
}
END_TEST

// Shapes that are no multiples of anything.
START_TEST(test_odd_shapes)
{
    static const uint32_t ROWS[] = {1, 3, 16, 17, 48, 300};
    static const uint32_t WIDTHS[] = {32, 64, 96, 256, 288, 576}, FLOAT_WIDTHS[] = {8, 40, 100, 1, 7, 300};
    static const uint32_t GENERATED[] = {0, 2, 5};
    uint64_t random = random_seed("test_odd_shapes");
    struct device *device = open_best();
    uint32_t type = WEIGHT_TYPES[_i];
    bool floats = tensor_type_info(type)->block_weights == 1;
    for (int r = 0; r < 6; r++) {
        for (int w = 0; w < 6; w++) {
            if (fixture_is_slow() && (r + w) % 5)
                continue;
            uint32_t width = floats ? FLOAT_WIDTHS[w] : any_width(type, WIDTHS[w]);
            struct problem p = make_problem(type, ROWS[r], width, 5, w % 2, &random);
            problem_put(device, &p);
            for (int g = 0; g < 3; g++)
                check_columns(device, &p, 5, GENERATED[g]);
            problem_drop(device, &p);
            free_problem(&p);
        }
    }
    fixture_close(device);
}
END_TEST

static const uint32_t LARGE_TYPES[] = {TENSOR_Q4_K, TENSOR_Q6_K, TENSOR_Q8_0, TENSOR_F16,
                                       TENSOR_Q4_0, TENSOR_Q5_K, TENSOR_BF16, TENSOR_Q2_K};
enum { N_LARGE_TYPES = sizeof LARGE_TYPES / sizeof *LARGE_TYPES, N_LARGE_SHAPES = 4 };
static const struct {
    uint32_t rows, width;
} LARGE_SHAPES[N_LARGE_SHAPES] = {{4096, 14336}, {14336, 4096}, {4096, 4096}, {1024, 8192}};

static void check_distance(struct device *device, struct problem *p, uint32_t count, uint32_t n_generated)
{
    double apart = check_columns(device, p, count, n_generated);
    if (getenv("STRATA_TEST_VERBOSE"))
        printf("%s %ux%u, %u columns (%u generated): %.2e\n", tensor_type_info(p->type)->name, p->rows,
               p->width, count, n_generated, apart);
    ck_assert_msg(apart <= distance_allowed(), "%s %ux%u, %u columns (%u generated): distance %.2e",
                  tensor_type_info(p->type)->name, p->rows, p->width, count, n_generated, apart);
}

// The matrices of an 8B model: one type a test, one shape after the other. Some rows are held against f64.
START_TEST(test_large)
{
    enum { MOST = 333, CHECKED = 24 };
    uint64_t random = random_seed("test_large");
    struct device *device = open_best();
    int shapes = fixture_on_cuda() && !fixture_is_slow() ? N_LARGE_SHAPES : 1;
    for (int i = 0; i < shapes; i++) {
        uint32_t rows = LARGE_SHAPES[i].rows, width = LARGE_SHAPES[i].width;
        struct problem p = make_sampled(LARGE_TYPES[_i], rows, width, MOST, false, CHECKED, &random);
        make_normal(&p, &random);
        problem_put(device, &p);
        check_distance(device, &p, 1, 1);
        check_distance(device, &p, 8, 8);
        if (fixture_on_cuda()) {
            check_distance(device, &p, 64, 64);
            check_distance(device, &p, 65, 65);
            check_distance(device, &p, MOST, 0);
            check_distance(device, &p, 43, 3);
        }
        problem_drop(device, &p);
        free_problem(&p);
    }
    fixture_close(device);
}
END_TEST

// --- the same bits ---

static void expect_same(const struct problem *p, const float *got, const float *alone, const char *what,
                        uint32_t column, uint32_t count)
{
    for (uint32_t n = 0; n < p->rows; n++)
        if (memcmp(got + n, alone + n, sizeof *got))
            ck_abort_msg("%s %ux%u, %s %u of %u, row %u: %.9g, alone %.9g", tensor_type_info(p->type)->name,
                         p->rows, p->width, what, column, count, n, got[n], alone[n]);
}

// What each column [0, n) gives when it is alone, as a generated token or as one of a prompt.
static float *multiply_alone(struct device *device, struct problem *p, uint32_t n, bool generated)
{
    float *alone = malloc(n * problem_stride(p) * sizeof *alone);
    for (uint32_t t = 0; t < n; t++)
        multiply(device, p, t, 1, generated, alone + t * problem_stride(p));
    return alone;
}

// Columns [first, first + count), of which n_generated are generated, against what they give alone.
static void check_bits(struct device *device, struct problem *p, uint32_t first, uint32_t count,
                       uint32_t n_generated, const float *generated, const float *prompt)
{
    size_t stride = problem_stride(p);
    float *out = malloc(count * stride * sizeof *out);
    multiply(device, p, first, count, n_generated, out);
    for (uint32_t t = 0; t < count; t++) {
        bool is_generated = t < n_generated;
        expect_same(p, out + t * stride, (is_generated ? generated : prompt) + (first + t) * stride,
                    is_generated ? "generated token" : "prompt token", t, count);
    }
    free(out);
}

static void check_company(uint32_t type, uint32_t rows, uint32_t width, uint32_t n_prompt, uint64_t *random)
{
    static const uint32_t COUNTS[] = {2, 3, 8, 9, 16, 33, 64, 65};
    enum { GENERATED = 66 };
    struct device *device = open_best();
    struct problem p =
        make_sampled(type, rows, width, n_prompt > GENERATED ? n_prompt : GENERATED, false, 1, random);
    problem_put(device, &p);
    float *generated = multiply_alone(device, &p, GENERATED, true);
    float *prompt = multiply_alone(device, &p, n_prompt, false);
    for (size_t i = 0; i < sizeof COUNTS / sizeof *COUNTS; i++)
        check_bits(device, &p, (uint32_t)(random_bits(random) % (GENERATED - COUNTS[i] + 1)), COUNTS[i],
                   COUNTS[i], generated, prompt);
    check_bits(device, &p, 0, n_prompt, 0, generated, prompt);
    check_bits(device, &p, 1, n_prompt / 2, 0, generated, prompt);
    check_bits(device, &p, 0, 43 < n_prompt ? 43 : n_prompt, 3, generated, prompt);
    check_bits(device, &p, 0, GENERATED < n_prompt ? GENERATED : n_prompt, 10, generated, prompt);
    free(generated);
    free(prompt);
    problem_drop(device, &p);
    free_problem(&p);
    fixture_close(device);
}

START_TEST(test_same_bits)
{
    uint64_t random = random_seed("test_same_bits");
    check_company(WEIGHT_TYPES[_i], 83, 768, fixture_is_slow() ? 70 : 333, &random);
}
END_TEST

// Large matrices may be cut differently: so many columns, so many ways to share the work.
START_TEST(test_same_bits_of_large)
{
    uint64_t random = random_seed("test_same_bits_of_large");
    bool whole = fixture_on_cuda() && !fixture_is_slow();
    check_company(LARGE_TYPES[_i], whole ? 4096 : 512, whole ? 14336 : 1024, 70, &random);
    if (whole)
        check_company(LARGE_TYPES[_i], 1024, 4096, 333, &random);
}
END_TEST

Suite *make_suite(void)
{
    Suite *suite = suite_create("matmul_classes");
    TCase *tcase = tcase_create("matmul_classes");
    int types = (int)N_WEIGHT_TYPES, large = fixture_is_slow() ? 2 : N_LARGE_TYPES;
    tcase_set_timeout(tcase, 240);
    tcase_add_loop_test(tcase, test_generated_counts, 0, types);
    tcase_add_loop_test(tcase, test_prompt_counts, 0, types);
    tcase_add_loop_test(tcase, test_odd_shapes, 0, types);
    tcase_add_loop_test(tcase, test_large, 0, large);
    tcase_add_loop_test(tcase, test_same_bits, 0, types);
    tcase_add_loop_test(tcase, test_same_bits_of_large, 0, large);
    suite_add_tcase(suite, tcase);
    return suite;
}
