/* The inner loops that decide the speed of UniRepLKNet on a CPU, in float32; see native.py for who calls them. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
typedef float lanes __attribute__((vector_size(4 * LANES))); /* neighbouring channels of one pixel */

enum { STRIP = 7 }; /* output pixels of a row that are summed at once: 7 divides 56, 28, 14 and 7 */

/* x Phi(x), exact to rounding: Phi(x) - 1/2 is x times a rational function of x^2, fitted on |x| <= 5.5 with an error
   of at most 7e-9. */
static inline float gelu(float x) {
    float z = x > 5.5f ? 5.5f : x;
    z = z < -5.5f ? -5.5f : z;
    float t = z * z;
    float over = ((((2.274945908e-08f * t + 6.352118800e-06f) * t + 1.688252634e-04f) * t + 4.677257990e-03f) * t + 3.385260226e-02f) * t + 3.989422346e-01f;
    float under = ((((1.197506779e-06f * t + 7.364739407e-05f) * t + 1.884442378e-03f) * t + 2.864584647e-02f) * t + 2.515218084e-01f) * t + 1;
    float phi = z * over / under;
    phi = phi > 0.5f ? 0.5f : phi;
    phi = phi < -0.5f ? -0.5f : phi;
    return x * (0.5f + phi);
}

/* h <- gelu(h + bias), and the sum of its squares down the rows, a part of the rows at a time.
   h (samples, rows, cols), bias (cols), energy (samples, parts, cols). */
void gelu_energy(float *h, const float *bias, float *energy, long samples, long rows, long cols, long parts) {
#pragma omp parallel for collapse(2) schedule(static)
    for (long sample = 0; sample < samples; sample++) {
        for (long part = 0; part < parts; part++) {
            float *sum = energy + (sample * parts + part) * cols;
            memset(sum, 0, cols * sizeof(float));
            for (long row = rows * part / parts; row < rows * (part + 1) / parts; row++) {
                float *values = h + (sample * rows + row) * cols;
#pragma omp simd
                for (long i = 0; i < cols; i++) {
                    float value = gelu(values[i] + bias[i]);
                    values[i] = value;
                    sum[i] += value * value;
                }
            }
        }
    }
}

/* y <- the layer norm of each row, then gelu if asked. x and y (rows, cols), weight and bias (cols). */
void layer_norm(const float *x, const float *weight, const float *bias, float *y, long rows, long cols, float eps,
                long activate) {
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++) {
        const float *from = x + row * cols;
        float *to = y + row * cols, sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < cols; i++) sum += from[i];
        float mean = sum / cols;
#pragma omp simd reduction(+ : squares)
        for (long i = 0; i < cols; i++) squares += (from[i] - mean) * (from[i] - mean);
        float scale = 1 / sqrtf(squares / cols + eps);
        if (activate) {
#pragma omp simd
            for (long i = 0; i < cols; i++) to[i] = gelu((from[i] - mean) * scale * weight[i] + bias[i]);
        } else {
#pragma omp simd
            for (long i = 0; i < cols; i++) to[i] = (from[i] - mean) * scale * weight[i] + bias[i];
        }
    }
}

/* A block of channels of one sample, copied into a padded map that fits the first-level cache: pixel (i, j) of
   x (height, width, chans) goes to map[i * padded + left + j]. */
static void copy_block(const float *x, lanes *map, long chans, long first, long height, long width, long padded,
                       long left) {
    size_t bytes = (chans - first < LANES ? chans - first : LANES) * sizeof(float);
    for (long i = 0; i < height; i++)
        for (long j = 0; j < width; j++)
            memcpy(map + i * padded + left + j, x + (i * width + j) * chans + first, bytes);
}

static lanes *zeros(long count) {
    lanes *memory = aligned_alloc(sizeof(lanes), count * sizeof(lanes));
    memset(memory, 0, count * sizeof(lanes));
    return memory;
}

/* Rows [*from, *to) of taps through which pixels of row i see the map and not only its padding. */
static void live_rows(long i, long height, long k_h, long dilation, long *from, long *to) {
    long above = i / dilation, below = (height - 1 - i) / dilation, top = k_h / 2;
    *from = above < top ? top - above : 0;
    *to = below < top ? top + below + 1 : k_h;
}

/* Depthwise convolution with zero padding that keeps the map's size; k_h and k_w are odd.
   x and y (batch, height, width, chans), taps (k_h, k_w, chans), bias (chans).
   The sums of a strip of output pixels stay in registers. */
void depthwise(const float *x, const float *taps, const float *bias, float *y, long batch, long chans, long height,
               long width, long k_h, long k_w, long dilation) {
    long blocks = (chans + LANES - 1) / LANES, top = k_h / 2, left = k_w / 2 * dilation;
    long padded = (width + STRIP - 1) / STRIP * STRIP + 2 * left;
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
                    for (long j = 0; j < width; j += STRIP) {
                        lanes sum[STRIP];
                        for (int s = 0; s < STRIP; s++) sum[s] = shift;
                        for (long k_y = from; k_y < to; k_y++) {
                            const lanes *pixels = map + (i + (k_y - top) * dilation) * padded + j;
                            for (long k_x = 0; k_x < k_w; k_x++, pixels += dilation) {
                                lanes tap = kernel[k_y * k_w + k_x];
                                for (int s = 0; s < STRIP; s++) sum[s] += tap * pixels[s];
                            }
                        }
                        float *out = y + start + (i * width + j) * chans + first;
                        for (int s = 0; s < STRIP && j + s < width; s++) memcpy(out + s * chans, &sum[s], bytes);
                    }
                }
            }
        }
        free(map);
        free(kernel);
    }
}

/* sum[s] += the gradient of tap (k_y, k_x + s) over a map, for `strip` neighbouring taps at once. */
static inline __attribute__((always_inline)) void gradient_strip(const lanes *map, const lanes *slope, lanes *total,
                                                                 long height, long width, long padded, long k_y,
                                                                 long k_x, long top, long dilation, const int strip) {
    lanes sum[STRIP] = {{0}};
    long down = (k_y - top) * dilation;
    for (long i = down < 0 ? -down : 0; i < height && i + down < height; i++) {
        const lanes *pixels = map + (i + down) * padded + k_x * dilation;
        for (long j = 0; j < width; j++)
            for (int s = 0; s < strip; s++) sum[s] += slope[i * width + j] * pixels[j + s * dilation];
    }
    for (int s = 0; s < strip; s++) total[s] += sum[s];
}

/* Gradient of the taps of `depthwise`, a part of the batch at a time.
   x and grad (batch, height, width, chans), out (parts, k_h, k_w, chans). */
void depthwise_taps(const float *x, const float *grad, float *out, long batch, long chans, long height, long width,
                    long k_h, long k_w, long dilation, long parts) {
    long blocks = (chans + LANES - 1) / LANES, top = k_h / 2, left = k_w / 2 * dilation;
    long strip = k_w <= 3 ? 3 : k_w <= 5 ? 5 : STRIP, wide = (k_w + strip - 1) / strip * strip;
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
                                gradient_strip(map, slope, sums, height, width, padded, k_y, k_x, top, dilation, STRIP);
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
