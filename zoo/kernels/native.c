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

/* Depthwise convolution with zero padding that keeps the map's size; k_h and k_w are odd.
   x and y (batch, height, width, chans), taps (k_h, k_w, chans), bias (chans).
   A block of channels of one sample is copied into a padded map that fits the first-level cache, where the sums of a
   strip of output pixels stay in registers. Rows of taps that meet padding only are left out. */
void depthwise(const float *x, const float *taps, const float *bias, float *y, long batch, long chans, long height,
               long width, long k_h, long k_w) {
    long blocks = (chans + LANES - 1) / LANES, top = k_h / 2, left = k_w / 2;
    long padded = (width + STRIP - 1) / STRIP * STRIP + k_w - 1;
#pragma omp parallel
    {
        lanes *map = aligned_alloc(sizeof(lanes), height * padded * sizeof(lanes));
        lanes *kernel = aligned_alloc(sizeof(lanes), k_h * k_w * sizeof(lanes));
        memset(map, 0, height * padded * sizeof(lanes));
        memset(kernel, 0, k_h * k_w * sizeof(lanes));
#pragma omp for collapse(2) schedule(static)
        for (long sample = 0; sample < batch; sample++) {
            for (long block = 0; block < blocks; block++) {
                long first = block * LANES;
                size_t bytes = (chans - first < LANES ? chans - first : LANES) * sizeof(float);
                lanes start = {0};
                memcpy(&start, bias + first, bytes);
                for (long i = 0; i < k_h * k_w; i++) memcpy(kernel + i, taps + i * chans + first, bytes);
                for (long i = 0; i < height; i++)
                    for (long j = 0; j < width; j++)
                        memcpy(map + i * padded + left + j, x + ((sample * height + i) * width + j) * chans + first, bytes);
                for (long i = 0; i < height; i++) {
                    long above = i < top ? top - i : 0, below = height + top - i < k_h ? height + top - i : k_h;
                    for (long j = 0; j < width; j += STRIP) {
                        lanes sum[STRIP];
                        for (int s = 0; s < STRIP; s++) sum[s] = start;
                        for (long k_y = above; k_y < below; k_y++) {
                            const lanes *from = map + (i + k_y - top) * padded + j;
                            for (long k_x = 0; k_x < k_w; k_x++) {
                                lanes tap = kernel[k_y * k_w + k_x];
                                for (int s = 0; s < STRIP; s++) sum[s] += tap * from[k_x + s];
                            }
                        }
                        float *to = y + ((sample * height + i) * width + j) * chans + first;
                        for (int s = 0; s < STRIP && j + s < width; s++) memcpy(to + s * chans, &sum[s], bytes);
                    }
                }
            }
        }
        free(map);
        free(kernel);
    }
}
