#pragma once

/* SIMD vectors, working memory, and checks, for all loops. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_thread_num(void) { return 0; }
#endif

#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
typedef float lanes __attribute__((vector_size(4 * LANES))); /* neighbouring channels of one pixel */

typedef float anywhere __attribute__((vector_size(4 * LANES), aligned(4))); /* unaligned */

#define INLINE static inline __attribute__((always_inline)) /* to specialise for constant arguments */

enum { ROW_TILE = 4, COL_TILE = 2 }; /* rows, and vectors of pixels, of the output summed at a time */

static inline long least(long a, long b) { return a < b ? a : b; }

/* Whether all n numbers are finite. */
static inline int all_finite(const float *x, long n) {
    int strange = 0;
#pragma omp simd reduction(| : strange)
    for (long i = 0; i < n; i++) strange |= !(fabsf(x[i]) <= FLT_MAX);
    return !strange;
}

/* Whether a variance is a finite number. */
INLINE int is_variance(float var) { return var <= FLT_MAX; }

static inline lanes *zeros(long count) {
    lanes *memory = aligned_alloc(sizeof(lanes), count * sizeof(lanes));
    memset(memory, 0, count * sizeof(lanes));
    return memory;
}

/* Store the first `count` numbers of some vectors. */
INLINE void store(const lanes *sum, float *y, long count) {
    if (count < COL_TILE * LANES)
        memcpy(y, sum, count * sizeof(float));
    else
        for (int s = 0; s < COL_TILE; s++) *(anywhere *)(y + s * LANES) = sum[s];
}

static inline float *new_numbers(long count) { return (float *)aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64); }
