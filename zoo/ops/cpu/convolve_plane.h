#pragma once

/* Depthwise convolution of one plane, one channel of one sample. */

#include "vectors.h"

/* Add the products of one row of pixels with its rows of taps to output rows `from` to `to`; `taps` is for row 0. */
INLINE void fma_row(const float *pixels, const float *taps, lanes sum[ROW_TILE][COL_TILE], long k_w, const int from,
                 const int to) {
    for (long k_x = 0; k_x < k_w; k_x++) {
        lanes pixel[COL_TILE];
        for (int s = 0; s < COL_TILE; s++) pixel[s] = *(const anywhere *)(pixels + k_x + s * LANES);
        for (int r = from; r <= to; r++)
            for (int s = 0; s < COL_TILE; s++) sum[r][s] += taps[k_x - r * k_w] * pixel[s];
    }
}

#define FMA_ROW(from, to)                                                                                                 \
    case from * ROW_TILE + to: fma_row(pixels, tap, sum, k_w, from, to); break;

/* Copy a plane, with padding on the left and right. */
static inline void copy_plane(const float *x, float *map, long height, long width, long padded, long left) {
    for (long i = 0; i < height; i++) {
        const float *from = x + i * width;
        float *to = map + i * padded + left;
        if (width % LANES)
            memcpy(to, from, width * sizeof(float));
        else
            for (long j = 0; j < width; j += LANES) *(anywhere *)(to + j) = *(const anywhere *)(from + j);
    }
}

/* Depthwise convolution of one plane, padded to `map` on all sides. */
static inline void plane(const float *map, const float *kernel, float *y, long height, long width, long padded, long k_h,
                  long k_w) {
    long top = k_h / 2;
    for (long i = 0; i < height; i += ROW_TILE) {
        for (long j = 0; j < width; j += COL_TILE * LANES) {
            lanes sum[ROW_TILE][COL_TILE] = {{{0}}};
            for (long k_y = i < top ? top - i : 0; k_y < k_h + ROW_TILE - 1 && i + k_y - top < height; k_y++) {
                const float *pixels = map + (i + k_y) * padded + j, *tap = kernel + k_y * k_w;
                switch ((k_y < k_h ? 0 : k_y - k_h + 1) * ROW_TILE + least(k_y, ROW_TILE - 1)) {
                    FMA_ROW(0, 3) FMA_ROW(0, 2) FMA_ROW(0, 1) FMA_ROW(0, 0) FMA_ROW(1, 3)
                    FMA_ROW(1, 2) FMA_ROW(1, 1) FMA_ROW(2, 3) FMA_ROW(2, 2) FMA_ROW(3, 3)
                }
            }
            for (long r = 0; r < least(ROW_TILE, height - i); r++) store(sum[r], y + (i + r) * width + j, width - j);
        }
    }
}

/* The same for a square kernel of constant size, without branches: padding rows are summed too. */
INLINE void small_plane(const float *map, const float *kernel, float *y, long height, long width, long padded,
                        const int k) {
    for (long i = 0; i < height; i += ROW_TILE) {
        for (long j = 0; j < width; j += COL_TILE * LANES) {
            lanes sum[ROW_TILE][COL_TILE] = {{{0}}};
#pragma GCC unroll 16
            for (int k_y = 0; k_y < k + ROW_TILE - 1; k_y++) {
                const float *pixels = map + (i + k_y) * padded + j;
#pragma GCC unroll 2
                for (int k_x = 0; k_x < k; k_x++) {
                    lanes pixel[COL_TILE];
                    for (int s = 0; s < COL_TILE; s++) pixel[s] = *(const anywhere *)(pixels + k_x + s * LANES);
#pragma GCC unroll 16
                    for (int r = 0; r < ROW_TILE; r++)
                        if (r <= k_y && k_y - r < k)
                            for (int s = 0; s < COL_TILE; s++) sum[r][s] += kernel[(k_y - r) * k + k_x] * pixel[s];
                }
            }
            for (long r = 0; r < least(ROW_TILE, height - i); r++) store(sum[r], y + (i + r) * width + j, width - j);
        }
    }
}

/* Working memory of a convolution of planes: the padded plane. */
typedef struct { long height, width, k_h, k_w, padded; float *map; } frame;

static inline frame new_frame(long height, long width, long k_h, long k_w) {
    long strip = COL_TILE * LANES, padded = (width + strip - 1) / strip * strip + k_w / 2 * 2;
    long rows = (height + ROW_TILE - 1) / ROW_TILE * ROW_TILE + k_h - 1;
    return (frame){height, width, k_h, k_w, padded, (float *)zeros((rows * padded + LANES - 1) / LANES)};
}

static inline void convolve(const frame *f, const float *x, const float *taps, float *y) {
    copy_plane(x, f->map + f->k_h / 2 * f->padded, f->height, f->width, f->padded, f->k_w / 2);
    switch (f->k_h == f->k_w ? f->k_h : 0) {
        case 3: small_plane(f->map, taps, y, f->height, f->width, f->padded, 3); break;
        case 5: small_plane(f->map, taps, y, f->height, f->width, f->padded, 5); break;
        case 7: small_plane(f->map, taps, y, f->height, f->width, f->padded, 7); break;
        case 9: small_plane(f->map, taps, y, f->height, f->width, f->padded, 9); break;
        default: plane(f->map, taps, y, f->height, f->width, f->padded, f->k_h, f->k_w);
    }
}
