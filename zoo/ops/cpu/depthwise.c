/* Depthwise convolution and gradient of its weight, for channels_last maps and for planes; see zoo/ops/depthwise.py. */

#include "convolve_plane.h"
#include "vectors.h"

enum { PIXEL_TILE = 7 }; /* output pixels of a row summed at a time: 7 divides 56, 28, 14 and 7 */

/* A block of channels of one sample, copied into a padded map that fits the first-level cache: pixel (i, j) of
   x (height, width, chans) goes to map[i * padded + left + j]. */
static void copy_block(const float *x, lanes *map, long chans, long first, long height, long width, long padded,
                       long left) {
    size_t bytes = (chans - first < LANES ? chans - first : LANES) * sizeof(float);
    for (long i = 0; i < height; i++)
        for (long j = 0; j < width; j++)
            memcpy(map + i * padded + left + j, x + (i * width + j) * chans + first, bytes);
}

/* Rows [*from, *to) of taps that reach the map, and not only its padding, from row i. */
static void live_rows(long i, long height, long k_h, long dilation, long *from, long *to) {
    long above = i / dilation, below = (height - 1 - i) / dilation, top = k_h / 2;
    *from = above < top ? top - above : 0;
    *to = below < top ? top + below + 1 : k_h;
}

/* Depthwise convolution with zero padding that keeps the map's size; k_h and k_w are odd.
   x and y (batch, height, width, chans), taps (k_h, k_w, chans), bias (chans).
   The sums of a strip of output pixels stay in registers. Returns 1, and does nothing, if a tap is not finite: its
   product with the padding would be NaN. */
long depthwise(const float *x, const float *taps, const float *bias, float *y, long batch, long chans, long height,
               long width, long k_h, long k_w, long dilation) {
    long blocks = (chans + LANES - 1) / LANES, top = k_h / 2, left = k_w / 2 * dilation;
    long padded = (width + PIXEL_TILE - 1) / PIXEL_TILE * PIXEL_TILE + 2 * left;
    if (!all_finite(taps, k_h * k_w * chans)) return 1;
#pragma omp parallel
    {
        lanes *map = zeros(height * padded), *kernel = zeros(k_h * k_w);
#pragma omp for collapse(2) schedule(static)
        for (long sample = 0; sample < batch; sample++) {
            for (long block = 0; block < blocks; block++) {
                long first = block * LANES, start = sample * height * width * chans;
                size_t bytes = (chans - first < LANES ? chans - first : LANES) * sizeof(float);
                lanes shift = {0};
                memcpy(&shift, bias + first, bytes);
                copy_block(taps, kernel, chans, first, k_h, k_w, k_w, 0);
                copy_block(x + start, map, chans, first, height, width, padded, left);
                for (long i = 0; i < height; i++) {
                    long from, to;
                    live_rows(i, height, k_h, dilation, &from, &to);
                    for (long j = 0; j < width; j += PIXEL_TILE) {
                        lanes sum[PIXEL_TILE];
                        for (int s = 0; s < PIXEL_TILE; s++) sum[s] = shift;
                        for (long k_y = from; k_y < to; k_y++) {
                            const lanes *pixels = map + (i + (k_y - top) * dilation) * padded + j;
                            for (long k_x = 0; k_x < k_w; k_x++, pixels += dilation) {
                                lanes tap = kernel[k_y * k_w + k_x];
                                for (int s = 0; s < PIXEL_TILE; s++) sum[s] += tap * pixels[s];
                            }
                        }
                        float *out = y + start + (i * width + j) * chans + first;
                        for (int s = 0; s < PIXEL_TILE && j + s < width; s++) memcpy(out + s * chans, &sum[s], bytes);
                    }
                }
            }
        }
        free(map);
        free(kernel);
    }
    return 0;
}

/* total[s] += gradient of tap (k_y, k_x + s) over a map, for `strip` neighbouring taps at a time. */
static inline __attribute__((always_inline)) void gradient_strip(const lanes *map, const lanes *slope, lanes *total,
                                                                 long height, long width, long padded, long k_y,
                                                                 long k_x, long top, long dilation, const int strip) {
    lanes sum[PIXEL_TILE] = {{0}};
    long down = (k_y - top) * dilation;
    for (long i = down < 0 ? -down : 0; i < height && i + down < height; i++) {
        const lanes *pixels = map + (i + down) * padded + k_x * dilation;
        for (long j = 0; j < width; j++)
            for (int s = 0; s < strip; s++) sum[s] += slope[i * width + j] * pixels[j + s * dilation];
    }
    for (int s = 0; s < strip; s++) total[s] += sum[s];
}

/* Gradient of the taps of `depthwise`, separately for parts of the batch.
   x and grad (batch, height, width, chans), out (parts, k_h, k_w, chans). */
void depthwise_taps(const float *x, const float *grad, float *out, long batch, long chans, long height, long width,
                    long k_h, long k_w, long dilation, long parts) {
    long blocks = (chans + LANES - 1) / LANES, top = k_h / 2, left = k_w / 2 * dilation;
    long strip = k_w <= 3 ? 3 : k_w <= 5 ? 5 : PIXEL_TILE, wide = (k_w + strip - 1) / strip * strip;
    long padded = width + (wide - 1) * dilation;
#pragma omp parallel
    {
        lanes *map = zeros(height * padded), *slope = zeros(height * width), *total = zeros(k_h * wide);
#pragma omp for collapse(2) schedule(static)
        for (long part = 0; part < parts; part++) {
            for (long block = 0; block < blocks; block++) {
                long first = block * LANES;
                memset(total, 0, k_h * wide * sizeof(lanes));
                for (long sample = batch * part / parts; sample < batch * (part + 1) / parts; sample++) {
                    copy_block(x + sample * height * width * chans, map, chans, first, height, width, padded, left);
                    copy_block(grad + sample * height * width * chans, slope, chans, first, height, width, width, 0);
                    for (long k_y = 0; k_y < k_h; k_y++) {
                        for (long k_x = 0; k_x < k_w; k_x += strip) {
                            lanes *sums = total + k_y * wide + k_x;
                            if (strip == 3)
                                gradient_strip(map, slope, sums, height, width, padded, k_y, k_x, top, dilation, 3);
                            else if (strip == 5)
                                gradient_strip(map, slope, sums, height, width, padded, k_y, k_x, top, dilation, 5);
                            else
                                gradient_strip(map, slope, sums, height, width, padded, k_y, k_x, top, dilation, PIXEL_TILE);
                        }
                    }
                }
                size_t bytes = (chans - first < LANES ? chans - first : LANES) * sizeof(float);
                float *to = out + part * k_h * k_w * chans + first;
                for (long k_y = 0; k_y < k_h; k_y++)
                    for (long k_x = 0; k_x < k_w; k_x++)
                        memcpy(to + (k_y * k_w + k_x) * chans, total + k_y * wide + k_x, bytes);
            }
        }
        free(map);
        free(slope);
        free(total);
    }
}

/* Depthwise convolution as above, without bias or dilation.
   x and y (batch, chans, height, width), taps (chans, k_h, k_w). Returns 1, and does nothing, if a tap is not finite. */
long depthwise_planes(const float *x, const float *taps, float *y, long batch, long chans, long height, long width,
                      long k_h, long k_w) {
    long points = height * width;
    if (!all_finite(taps, chans * k_h * k_w)) return 1;
#pragma omp parallel
    {
        frame f = new_frame(height, width, k_h, k_w);
#pragma omp for schedule(static)
        for (long p = 0; p < batch * chans; p++)
            convolve(&f, x + p * points, taps + p % chans * k_h * k_w, y + p * points);
        free(f.map);
    }
    return 0;
}

/* total[s] += gradient of tap (k_y, k_x + s), lane by lane, for `strip` neighbouring taps at a time. */
INLINE void plane_gradient_strip(const float *map, const float *slope, lanes *total, long height, long width,
                                 long padded, long down, const int strip) {
    lanes sum[9] = {{0}};
    for (long i = down < 0 ? -down : 0; i < height && i + down < height; i++)
        for (long j = 0; j < width; j += LANES) {
            lanes grad = *(const anywhere *)(slope + i * padded + j);
            for (int s = 0; s < strip; s++) sum[s] += grad * *(const anywhere *)(map + (i + down) * padded + j + s);
        }
    for (int s = 0; s < strip; s++) total[s] += sum[s];
}

/* Gradient of the taps of `depthwise_planes`, separately for parts of the batch.
   x and grad (batch, chans, height, width), out (parts, chans, k_h, k_w). */
void depthwise_planes_taps(const float *x, const float *grad, float *out, long batch, long chans, long height,
                           long width, long k_h, long k_w, long parts) {
    long strip = k_w <= 3 ? 3 : k_w <= 5 ? 5 : k_w <= 7 ? 7 : 9, wide = (k_w + strip - 1) / strip * strip;
    long top = k_h / 2, left = k_w / 2, points = height * width;
    long padded = (width + LANES - 1) / LANES * LANES + (wide > 2 * left ? wide : 2 * left);
    long room = (height * padded + wide + LANES - 1) / LANES;
#pragma omp parallel
    {
        float *map = (float *)zeros(room), *slope = (float *)zeros(room);
        lanes *total = zeros(k_h * wide);
#pragma omp for collapse(2) schedule(static)
        for (long part = 0; part < parts; part++) {
            for (long chan = 0; chan < chans; chan++) {
                memset(total, 0, k_h * wide * sizeof(lanes));
                for (long sample = batch * part / parts; sample < batch * (part + 1) / parts; sample++) {
                    copy_plane(x + (sample * chans + chan) * points, map, height, width, padded, left);
                    copy_plane(grad + (sample * chans + chan) * points, slope, height, width, padded, 0);
                    for (long k_y = 0; k_y < k_h; k_y++)
                        for (long k_x = 0; k_x < k_w; k_x += strip) {
                            const float *pixels = map + k_x;
                            long down = k_y - top;
                            lanes *sums = total + k_y * wide + k_x;
                            if (strip == 3)
                                plane_gradient_strip(pixels, slope, sums, height, width, padded, down, 3);
                            else if (strip == 5)
                                plane_gradient_strip(pixels, slope, sums, height, width, padded, down, 5);
                            else if (strip == 7)
                                plane_gradient_strip(pixels, slope, sums, height, width, padded, down, 7);
                            else
                                plane_gradient_strip(pixels, slope, sums, height, width, padded, down, 9);
                        }
                }
                for (long k_y = 0; k_y < k_h; k_y++)
                    for (long k_x = 0; k_x < k_w; k_x++) {
                        lanes sums = total[k_y * wide + k_x];
                        float sum = 0;
                        for (int s = 0; s < LANES; s++) sum += sums[s];
                        out[((part * chans + chan) * k_h + k_y) * k_w + k_x] = sum;
                    }
            }
        }
        free(map);
        free(slope);
        free(total);
    }
}
