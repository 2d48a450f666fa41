#pragma once

/* Products of small matrices, as in BLIS: a panel of NR columns of the second factor stays in the L1 cache. */

#include "vectors.h"

enum { MR = 6, NR_VECTORS = 2 };  /* rows, and vectors of columns, summed at a time: as many as fit in registers */
enum { NR = NR_VECTORS * LANES }; /* columns of a panel */
enum { KC = 320 };           /* terms per partial sum, for accuracy */

/* First entry of a matrix, and strides of rows and columns. */
typedef struct { const float *at; long down, right; } matrix;

/* sum <- the first rows of a times a panel b (terms, NR). */
INLINE void sum_rows(matrix a, const lanes *b, long terms, lanes sum[][NR_VECTORS], const int mr) {
    for (int r = 0; r < mr; r++)
        for (int s = 0; s < NR_VECTORS; s++) sum[r][s] = (lanes){0};
    for (long l = 0; l < terms; l++)
        for (int r = 0; r < mr; r++)
            for (int s = 0; s < NR_VECTORS; s++) sum[r][s] += a.at[r * a.down + l * a.right] * b[l * NR_VECTORS + s];
}

/* Run a statement with a constant `mr` = min(rows, MR). */
#define WITH_MR(rows, ...)                                                                                           \
    switch (rows) {                                                                                                    \
        case 1: { enum { mr = 1 }; __VA_ARGS__; break; }                                                             \
        case 2: { enum { mr = 2 }; __VA_ARGS__; break; }                                                             \
        case 3: { enum { mr = 3 }; __VA_ARGS__; break; }                                                             \
        case 4: { enum { mr = 4 }; __VA_ARGS__; break; }                                                             \
        case 5: { enum { mr = 5 }; __VA_ARGS__; break; }                                                             \
        default: { enum { mr = MR }; __VA_ARGS__; }                                                                \
    }

#ifdef __AVX512F__
enum { MR_TWICE = 2 * MR }; /* rows at a time: there are twice as many registers */
#else
enum { MR_TWICE = MR };
#endif
enum { NC = 512 }; /* pixels at a time: the L2 cache holds KC floats of each */

/* y <- (y +) some rows of w, with stride `down`, times a panel of pixels (terms, NR). */
INLINE void mix_rows(const float *w, long down, const lanes *panel, long terms, float *y, long step, long width,
                     int more, const int mr) {
    lanes sum[MR_TWICE][NR_VECTORS];
    sum_rows((matrix){w, down, 1}, panel, terms, sum, mr);
    for (int r = 0; r < mr; r++, y += step) {
        if (width < NR) {
            const float *sums = (const float *)sum[r];
            for (long j = 0; j < width; j++) y[j] = more ? y[j] + sums[j] : sums[j];
        } else {
            for (int s = 0; s < NR_VECTORS; s++) {
                anywhere *to = (anywhere *)(y + s * LANES);
                *to = more ? *to + sum[r][s] : sum[r][s];
            }
        }
    }
}

/* The same for min(left, MR_TWICE) rows and any width. */
static inline void mix_block(const float *w, long down, const lanes *panel, long terms, float *y, long step, long width,
                      int more, long left) {
    if (left >= MR_TWICE && width == NR) {
        mix_rows(w, down, panel, terms, y, step, width, more, MR_TWICE);
        return;
    }
    for (long i = 0; i < least(left, MR_TWICE); i += MR)
        WITH_MR(left - i, mix_rows(w + i * down, down, panel, terms, y + i * step, step, width, more, mr))
}

/* Part of a sum over channels: w (rows, terms) with row stride `down`, x (terms, points). */
typedef struct { const float *w; long down; const float *x; long terms; } part;

/* y (rows, points) <- (y +) w x, for pixels `from` to `to`. panels: working memory of KC NC floats. */
static inline void mix_part(const part *p, float *y, long rows, long points, long from, long to, int more, float *panels) {
    for (long l = 0; l < p->terms; l += KC) {
        long deep = least(p->terms - l, KC);
        for (long k = 0; k < deep; k++) {
            const float *pixels = p->x + (l + k) * points;
            for (long j = from; j < to; j += NR) {
                lanes *panel = (lanes *)(panels + (j - from) * deep + k * NR);
                if (to - j < NR) {
                    memset(panel, 0, NR * sizeof(float));
                    memcpy(panel, pixels + j, (to - j) * sizeof(float));
                } else {
                    for (int s = 0; s < NR_VECTORS; s++) panel[s] = *(const anywhere *)(pixels + j + s * LANES);
                }
            }
        }
        for (long i = 0; i < rows; i += MR_TWICE)
            for (long j = from; j < to; j += NR)
                mix_block(p->w + i * p->down + l, p->down, (lanes *)(panels + (j - from) * deep), deep,
                          y + i * points + j, points, least(to - j, NR), more || l > 0, rows - i);
    }
}

/* Every row of y (rows, points) <- its bias. */
static inline void fill_rows(const float *bias, float *y, long rows, long points) {
    for (long i = 0; i < rows; i++)
        for (long j = 0; j < points; j++) y[i * points + j] = bias[i];
}

/* y (rows, points) <- (y +) sum over parts of w x. */
static inline void mix_sample(const part *parts, long count, float *y, long rows, long points, int more, float *panels) {
    for (long from = 0; from < points; from += NC)
        for (long p = 0; p < count; p++)
            mix_part(parts + p, y, rows, points, from, least(from + NC, points), more || p > 0, panels);
}

INLINE void product_rows(matrix a, const lanes *b, float *out, long terms, long step, long width, const int mr) {
    lanes sum[MR][NR_VECTORS];
    sum_rows(a, b, terms, sum, mr);
    for (int r = 0; r < mr; r++) {
        const float *sums = (const float *)sum[r];
        for (long j = 0; j < width; j++) out[r * step + j] += sums[j];
    }
}

/* out (rows, cols) += a b. Only the lower triangle of b is read if b_lower, and of out is valid if out_lower. */
static inline void product(matrix a, matrix b, float *out, long rows, long terms, long cols, long b_lower, long out_lower) {
    lanes side[KC * NR_VECTORS];
    for (long j = 0; j < cols; j += NR) {
        long width = cols - j < NR ? cols - j : NR;
        if (width < NR) memset(side, 0, sizeof(side));
        for (long first = b_lower ? j : 0; first < terms; first += KC) {
            long deep = terms - first < KC ? terms - first : KC;
            for (long l = 0; l < deep; l++) {
                const float *row = b.at + (first + l) * b.down + j * b.right;
                if (b.right == 1 && width == NR)
                    memcpy(side + l * NR_VECTORS, row, NR * sizeof(float));
                else
                    for (long c = 0; c < width; c++) ((float *)side)[l * NR + c] = row[c * b.right];
            }
            for (long i = out_lower ? j : 0; i < rows; i += MR) {
                matrix some = {a.at + i * a.down + first * a.right, a.down, a.right};
                WITH_MR(rows - i, product_rows(some, side, out + i * cols + j, deep, cols, width, mr))
            }
        }
    }
}
