/* The inner loops that decide the speed of UniRepLKNet, Terminator, KCL and small GRBF networks on a CPU, in float32;
   see native.py for who calls them. The first are for channels_last maps, the second for planes: one channel of one
   sample each. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif

#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
typedef float lanes __attribute__((vector_size(4 * LANES))); /* neighbouring channels of one pixel */

typedef float anywhere __attribute__((vector_size(4 * LANES), aligned(4))); /* in any place of a row */

#define INLINE static inline __attribute__((always_inline)) /* so that arguments that are constant drop out */

/* ---- products of matrices: a panel, so many neighbouring columns of the second factor, stays in the first cache ---- */

enum { TALL = 6, BROAD = 2 };  /* rows, and vectors of columns, that are summed at once: registers hold no more */
enum { SIDE = BROAD * LANES }; /* columns of a panel */
enum { DEEP = 320 };           /* terms that are summed before they are added to the rest: more would lose digits */

/* The first entry of a matrix, and the steps to the next row and column. */
typedef struct { const float *at; long down, right; } matrix;

/* sum <- the first rows of a times a panel b (terms, SIDE). */
INLINE void sum_rows(matrix a, const lanes *b, long terms, lanes sum[][BROAD], const int tall) {
    for (int r = 0; r < tall; r++)
        for (int s = 0; s < BROAD; s++) sum[r][s] = (lanes){0};
    for (long l = 0; l < terms; l++)
        for (int r = 0; r < tall; r++)
            for (int s = 0; s < BROAD; s++) sum[r][s] += a.at[r * a.down + l * a.right] * b[l * BROAD + s];
}

/* The statement with `tall` a constant: so many rows, but at most TALL. */
#define WITH_TALL(rows, ...)                                                                                           \
    switch (rows) {                                                                                                    \
        case 1: { enum { tall = 1 }; __VA_ARGS__; break; }                                                             \
        case 2: { enum { tall = 2 }; __VA_ARGS__; break; }                                                             \
        case 3: { enum { tall = 3 }; __VA_ARGS__; break; }                                                             \
        case 4: { enum { tall = 4 }; __VA_ARGS__; break; }                                                             \
        case 5: { enum { tall = 5 }; __VA_ARGS__; break; }                                                             \
        default: { enum { tall = TALL }; __VA_ARGS__; }                                                                \
    }

static inline long least(long a, long b) { return a < b ? a : b; }

/* Whether no number of n is infinite or not a number. */
static int all_finite(const float *x, long n) {
    int strange = 0;
#pragma omp simd reduction(| : strange)
    for (long i = 0; i < n; i++) strange |= !(fabsf(x[i]) <= FLT_MAX);
    return !strange;
}

/* ---- channels_last ---- */

enum { STRIP = 7 }; /* output pixels of a row that are summed at once: 7 divides 56, 28, 14 and 7 */

/* Phi(x), exact to rounding: Phi(x) - 1/2 is x times a rational function of x^2, fitted on |x| <= 5.5 with an error of
   at most 7e-9. */
static inline float gelu_share(float x) {
    float z = x > 5.5f ? 5.5f : x;
    z = z < -5.5f ? -5.5f : z;
    float t = z * z;
    float over = ((((2.274945908e-08f * t + 6.352118800e-06f) * t + 1.688252634e-04f) * t + 4.677257990e-03f) * t + 3.385260226e-02f) * t + 3.989422346e-01f;
    float under = ((((1.197506779e-06f * t + 7.364739407e-05f) * t + 1.884442378e-03f) * t + 2.864584647e-02f) * t + 2.515218084e-01f) * t + 1;
    float phi = z * over / under;
    phi = phi > 0.5f ? 0.5f : phi;
    phi = phi < -0.5f ? -0.5f : phi;
    return 0.5f + phi;
}

/* Of infinity it is not a number, as the library has it. */
static inline float gelu(float x) { return x * gelu_share(x) + 0 * x; }

/* ---- shortcut + W2 GRN(GELU(W1 (gate x) + b1)) + b2, gate = sigmoid(U relu(D mean(x) + d) + u) ---- */

enum { ROWS = 17 * TALL }; /* pixels at a time, at most: the second cache holds DEEP numbers of each */

/* x, shortcut and y (batch, pixels, chans), D (few, chans), d (few), U (chans, few), u (chans), b1 and gamma (wide),
   b2 (chans), and the panels of W1 (wide, chans) and W2 (chans, wide). */
typedef struct {
    const float *x, *D, *d, *U, *u, *b1, *gamma, *b2, *shortcut;
    const lanes *first, *second;
    float *y;
    long pixels, chans, few, wide;
} network;

/* gate (chans) of a sample; squeezed (chans + few) is working memory. */
static void attend(const network *n, long sample, float *gate, float *squeezed) {
    const float *x = n->x + sample * n->pixels * n->chans;
    float *mean = squeezed, *hidden = squeezed + n->chans;
    memset(mean, 0, n->chans * sizeof(float));
    for (long first = 0; first < n->pixels; first += ROWS) { /* long sums in one float would lose digits */
        long last = least(first + ROWS, n->pixels);
        memset(gate, 0, n->chans * sizeof(float));
        for (long pixel = first; pixel < last; pixel++) {
#pragma omp simd
            for (long c = 0; c < n->chans; c++) gate[c] += x[pixel * n->chans + c];
        }
        for (long c = 0; c < n->chans; c++) mean[c] += gate[c] / n->pixels;
    }
    for (long h = 0; h < n->few; h++) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long c = 0; c < n->chans; c++) sum += n->D[h * n->chans + c] * mean[c];
        sum += n->d[h];
        hidden[h] = sum < 0 ? 0 : sum;
    }
    for (long c = 0; c < n->chans; c++) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long h = 0; h < n->few; h++) sum += n->U[c * n->few + h] * hidden[h];
        gate[c] = 1 / (1 + expf(-(sum + n->u[c])));
    }
}

static long panels_of(long outputs) { return (outputs + SIDE - 1) / SIDE; }

static lanes *new_panels(long outputs, long terms) {
    return aligned_alloc(sizeof(lanes), panels_of(outputs) * terms * SIDE * sizeof(float));
}

typedef float eight __attribute__((vector_size(32), aligned(4)));

#if defined(__clang__) || __GNUC__ >= 12
#define EIGHT(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t places __attribute__((vector_size(32)));
#define EIGHT(a, b, ...) __builtin_shuffle(a, b, (places){__VA_ARGS__})
#endif

/* to (8, 8), rows a step apart <- from (8, 8) transposed. */
INLINE void transpose(const float *from, long from_step, float *to, long to_step) {
    eight r[8], pairs[8], fours[8];
    for (int i = 0; i < 8; i++) r[i] = *(const eight *)(from + i * from_step);
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = EIGHT(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        pairs[i + 1] = EIGHT(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = EIGHT(pairs[i + j], pairs[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            fours[i + 2 * j + 1] = EIGHT(pairs[i + j], pairs[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        *(eight *)(to + i * to_step) = EIGHT(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        *(eight *)(to + (i + 4) * to_step) = EIGHT(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

/* panels <- w (outputs, terms): for SIDE outputs after the other, all terms; zeros where there are fewer outputs. */
static void put_panels(const float *w, lanes *panels, long outputs, long terms) {
#pragma omp for schedule(static)
    for (long j = 0; j < outputs; j += SIDE) {
        float *panel = (float *)panels + j * terms;
        long width = least(outputs - j, SIDE), whole = width < SIDE ? 0 : terms / 8 * 8;
        if (width < SIDE) memset(panel, 0, terms * SIDE * sizeof(float));
        for (long l = 0; l < whole; l += 8)
            for (long c = 0; c < SIDE; c += 8)
                transpose(w + (j + c) * terms + l, terms, panel + l * SIDE + c, SIDE);
        for (long l = whole; l < terms; l++)
            for (long c = 0; c < width; c++) panel[l * SIDE + c] = w[(j + c) * terms + l];
    }
}

/* part (rows, deep) <- columns of x times their scales. */
static void put_scaled(const float *x, long step, const float *scale, float *part, long rows, long deep) {
    for (long r = 0; r < rows; r++) {
#pragma omp simd
        for (long l = 0; l < deep; l++) part[r * deep + l] = x[r * step + l] * scale[l];
    }
}

/* h <- (h +) a b of some rows and the columns of a panel; at last gelu of that and the bias, and its energies. */
INLINE void hidden_rows(const float *a, const lanes *b, long deep, float *h, long step, const float *bias, float *energy,
                        long width, int more, int last, const int tall) {
    lanes sum[TALL][BROAD];
    sum_rows((matrix){a, deep, 1}, b, deep, sum, tall);
    for (int r = 0; r < tall; r++, h += step) {
        float *sums = (float *)sum[r];
        if (more)
            for (long c = 0; c < width; c++) sums[c] += h[c];
        if (!last) {
            memcpy(h, sums, width * sizeof(float));
            continue;
        }
#pragma omp simd
        for (long c = 0; c < width; c++) {
            h[c] = gelu(sums[c] + bias[c]);
            energy[c] += h[c] * h[c];
        }
    }
}

/* The hidden layer of some pixels, and the energies of its channels over them. */
static void hide(const network *n, long sample, const float *gate, long from, long to, float *hidden, float *energy) {
    float part[ROWS * DEEP];
    long rows = to - from, chans = n->chans, wide = n->wide;
    const float *x = n->x + (sample * n->pixels + from) * chans;
    memset(energy, 0, wide * sizeof(float));
    for (long l = 0; l < chans; l += DEEP) {
        long deep = least(chans - l, DEEP);
        put_scaled(x + l, chans, gate + l, part, rows, deep);
        for (long j = 0; j < wide; j += SIDE) {
            const lanes *panel = n->first + (j * chans + l * SIDE) / LANES;
            for (long i = 0; i < rows; i += TALL) {
                float *h = hidden + (from + i) * wide + j;
                long width = least(wide - j, SIDE);
                if (width == SIDE) {
                    WITH_TALL(rows - i, hidden_rows(part + i * deep, panel, deep, h, wide, n->b1 + j, energy + j, SIDE,
                                                    l > 0, l + deep == chans, tall))
                } else {
                    WITH_TALL(rows - i, hidden_rows(part + i * deep, panel, deep, h, wide, n->b1 + j, energy + j, width,
                                                    l > 0, l + deep == chans, tall))
                }
            }
        }
    }
}

/* energy (parts, wide): in its first row what GRN multiplies the channels with. */
static void respond(const network *n, float *energy, long parts) {
    double total = 0;
    for (long c = 0; c < n->wide; c++) {
        double sum = 0;
        for (long p = 0; p < parts; p++) sum += energy[p * n->wide + c];
        energy[c] = sqrtf(sum);
        total += energy[c];
    }
    float scale = 1 / (total / n->wide + 1e-6);
    for (long c = 0; c < n->wide; c++) energy[c] = 1 + n->gamma[c] * energy[c] * scale;
}

INLINE void output_rows(const float *a, const lanes *b, long deep, float *y, const float *shortcut, const float *bias,
                        long step, long width, int more, const int tall) {
    lanes sum[TALL][BROAD];
    sum_rows((matrix){a, deep, 1}, b, deep, sum, tall);
    for (int r = 0; r < tall; r++, y += step, shortcut += step) {
        const float *sums = (const float *)sum[r];
        if (more)
            for (long c = 0; c < width; c++) y[c] += sums[c];
        else
            for (long c = 0; c < width; c++) y[c] = sums[c] + shortcut[c] + bias[c];
    }
}

/* The outputs of some pixels. */
static void answer(const network *n, long sample, long from, long to, const float *hidden, const float *scale) {
    float part[ROWS * DEEP];
    long rows = to - from, chans = n->chans, wide = n->wide, at = (sample * n->pixels + from) * chans;
    for (long l = 0; l < wide; l += DEEP) {
        long deep = least(wide - l, DEEP);
        put_scaled(hidden + from * wide + l, wide, scale + l, part, rows, deep);
        for (long j = 0; j < chans; j += SIDE) {
            const lanes *panel = n->second + (j * wide + l * SIDE) / LANES;
            for (long i = 0; i < rows; i += TALL) {
                long to = at + i * chans + j, width = least(chans - j, SIDE);
                if (width == SIDE) {
                    WITH_TALL(rows - i, output_rows(part + i * deep, panel, deep, n->y + to, n->shortcut + to,
                                                    n->b2 + j, chans, SIDE, l > 0, tall))
                } else {
                    WITH_TALL(rows - i, output_rows(part + i * deep, panel, deep, n->y + to, n->shortcut + to,
                                                    n->b2 + j, chans, width, l > 0, tall))
                }
            }
        }
    }
}

/* hidden: for as many samples as are treated at once, (pixels, wide) each. */
void feed_forward(const float *x, const float *D, const float *d, const float *U, const float *u, const float *w1,
                  const float *b1, const float *gamma, const float *w2, const float *b2, const float *shortcut, float *y,
                  float *hidden, long batch, long pixels, long chans, long few, long wide, long threads) {
    long parts = (pixels + ROWS - 1) / ROWS, size = ((pixels + parts - 1) / parts + TALL - 1) / TALL * TALL;
    long own = parts * wide + 2 * chans + few; /* numbers of working memory of a thread */
    lanes *first = new_panels(wide, chans), *second = new_panels(chans, wide);
    float *memory = malloc(threads * own * sizeof(float));
    network n = {x, D, d, U, u, b1, gamma, b2, shortcut, first, second, y, pixels, chans, few, wide};
#define PART least(p *size, pixels), least((p + 1) * size, pixels)
#pragma omp parallel num_threads(threads)
    {
        long thread = batch < threads ? 0 : omp_get_thread_num(); /* with enough samples, one is one thread's */
        float *h = hidden + thread * pixels * wide, *energy = memory + thread * own, *gate = energy + parts * wide;
        put_panels(w1, first, wide, chans);
        put_panels(w2, second, chans, wide);
        if (batch >= threads) {
#pragma omp for schedule(dynamic)
            for (long sample = 0; sample < batch; sample++) {
                attend(&n, sample, gate, gate + chans);
                for (long p = 0; p < parts; p++) hide(&n, sample, gate, PART, h, energy + p * wide);
                respond(&n, energy, parts);
                for (long p = 0; p < parts; p++) answer(&n, sample, PART, h, energy);
            }
        } else {
            for (long sample = 0; sample < batch; sample++) {
#pragma omp single
                attend(&n, sample, gate, gate + chans);
#pragma omp for schedule(dynamic)
                for (long p = 0; p < parts; p++) hide(&n, sample, gate, PART, h, energy + p * wide);
#pragma omp single
                respond(&n, energy, parts);
#pragma omp for schedule(dynamic)
                for (long p = 0; p < parts; p++) answer(&n, sample, PART, h, energy);
            }
        }
    }
#undef PART
    free(first);
    free(second);
    free(memory);
}

/* Whether a variance is a finite number. */
INLINE int is_variance(float var) { return var <= FLT_MAX; }

/* y <- the layer norm of each row, then gelu if asked. x and y (rows, cols), weight and bias (cols). Returns how many rows
   have a variance that is not finite. */
long layer_norm(const float *x, const float *weight, const float *bias, float *y, long rows, long cols, float eps,
                long activate) {
    long strange = 0;
#pragma omp parallel for schedule(static) reduction(+ : strange)
    for (long row = 0; row < rows; row++) {
        const float *from = x + row * cols;
        float *to = y + row * cols, sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < cols; i++) sum += from[i];
        float mean = sum / cols;
#pragma omp simd reduction(+ : squares)
        for (long i = 0; i < cols; i++) squares += (from[i] - mean) * (from[i] - mean);
        float scale = 1 / sqrtf(squares / cols + eps);
        strange += !is_variance(squares);
        if (activate) {
#pragma omp simd
            for (long i = 0; i < cols; i++) to[i] = gelu((from[i] - mean) * scale * weight[i] + bias[i]);
        } else {
#pragma omp simd
            for (long i = 0; i < cols; i++) to[i] = (from[i] - mean) * scale * weight[i] + bias[i];
        }
    }
    return strange;
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
   The sums of a strip of output pixels stay in registers. Returns 1, and does nothing, if a tap is not finite: it would
   meet the padding. */
long depthwise(const float *x, const float *taps, const float *bias, float *y, long batch, long chans, long height,
               long width, long k_h, long k_w, long dilation) {
    long blocks = (chans + LANES - 1) / LANES, top = k_h / 2, left = k_w / 2 * dilation;
    long padded = (width + STRIP - 1) / STRIP * STRIP + 2 * left;
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
    return 0;
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

/* ---- planes ---- */


/* 2^(whole + part), for a whole number from -126 and a part of it between -1/2 and 1/2. */
static inline float two_to(float whole, float part) {
    float two_to_part = ((((((1.5252734e-5f * part + 1.5403530e-4f) * part + 1.3333558e-3f) * part + 9.6181291e-3f) * part + 5.5504109e-2f) * part + 0.24022651f) * part + 0.69314718f) * part + 1;
    union { int bits; float number; } two_to_whole = {((int)whole + 127) << 23};
    return two_to_part * two_to_whole.number;
}

/* e^x, at most 1, as the square of its root, so that it may underflow; log2(e) is the sum of two parts. */
static inline float capped_exponential(float x) {
    union { float number; int bits; } given = {x};
    float t = x > 0 ? 0 : 0.5f * x;
    t = t < -87 ? -87 : t;
    float whole = floorf(1.44269502f * t + 0.5f), root = two_to(whole, 1.44269502f * t - whole + 1.925963e-8f * t);
    return (given.bits & 0x7fffffff) > 0x7f800000 ? x : root * root; /* what is not a number stays so */
}

/* Derivative of gelu: Phi(x) + x phi(x) with the density phi. */
static inline float gelu_slope(float x) {
    float power = -0.72134752f * x * x, held = power < -126 ? -126 : power;
    float whole = floorf(held + 0.5f), density = 0.39894228f * two_to(whole, held - whole);
    return gelu_share(x) + x * (power < -126 ? 0 : density); /* infinity times zero is not a number */
}

INLINE float product_of(const float *x, const float *times, long i) { return times ? x[i] * times[i] : x[i]; }

/* Mean and biased variance of a plane of x, or of its product with `times`; the second sum corrects the first. */
INLINE void plane_moments(const float *x, const float *times, long points, float *mean, float *var) {
    float sum = 0, rest = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < points; i++) sum += product_of(x, times, i);
    float middle = sum / points;
#pragma omp simd reduction(+ : rest, squares)
    for (long i = 0; i < points; i++) {
        float apart = product_of(x, times, i) - middle;
        rest += apart;
        squares += apart * apart;
    }
    rest /= points;
    *mean = fabsf(middle) <= FLT_MAX ? middle + rest : middle;
    *var = squares / points - rest * rest;
}

/* x (planes, points), mean and var (planes). */
void moments(const float *x, float *mean, float *var, long planes, long points) {
#pragma omp parallel for schedule(static)
    for (long p = 0; p < planes; p++) plane_moments(x + p * points, NULL, points, mean + p, var + p);
}

/* From mean and var of every plane those to standardise with, and 1 / standard deviation: channels of the even groups
   share theirs over the batch, or have known ones, (these channels).
   mean and var (batch, chans), overwritten. */
void shared_moments(float *mean, float *var, const float *known_mean, const float *known_var, long batch, long chans,
                    long groups, float eps) {
    for (long c = 0, even = 0; c < chans; c++) {
        if (c * groups / chans % 2 == 0) {
            double middle = 0, spread = 0;
            for (long b = 0; b < batch; b++) middle += mean[b * chans + c] / batch;
            for (long b = 0; b < batch; b++) {
                double apart = mean[b * chans + c] - middle;
                spread += (var[b * chans + c] + apart * apart) / batch;
            }
            for (long b = 0; b < batch; b++) {
                mean[b * chans + c] = known_mean ? known_mean[even] : middle;
                var[b * chans + c] = known_var ? known_var[even] : spread;
            }
            even++;
        }
        for (long b = 0; b < batch; b++) var[b * chans + c] = 1 / sqrtf(var[b * chans + c] + eps);
    }
}

/* Returns 1, with a scale of 0 and y as it was, if its own variance is not finite. */
INLINE int plane_standardise(const float *x, const float *times, const float *bias, float *y, float *mean,
                             float *scale, long points, float eps, long own) {
    if (own) {
        float var;
        plane_moments(x, times, points, mean, &var);
        *scale = is_variance(var) ? 1 / sqrtf(var + eps) : 0;
        if (!is_variance(var)) return 1;
    }
    float middle = *mean, factor = *scale;
#pragma omp simd
    for (long i = 0; i < points; i++) {
        float z = (product_of(x, times, i) - middle) * factor;
        y[i] = bias ? gelu(z) + bias[i] : z;
    }
    return 0;
}

/* y <- (x times - mean) scale of every plane, or gelu of that, plus bias; its own moments if asked.
   x, times (or NULL: ones) and y (planes, points), y may be x; bias (points), or NULL: no gelu; mean and scale (planes),
   written with its own moments, read otherwise. Returns how many planes were left as they are, with a scale of 0, for
   their own variance is not finite. */
long standardise(const float *x, const float *times, const float *bias, float *y, float *mean, float *scale,
                 long planes, long points, float eps, long own) {
    long strange = 0;
#pragma omp parallel for schedule(static) reduction(+ : strange)
    for (long p = 0; p < planes; p++) {
        long at = p * points;
        if (times)
            strange += plane_standardise(x + at, times + at, bias, y + at, mean + p, scale + p, points, eps, own);
        else if (bias)
            strange += plane_standardise(x + at, NULL, bias, y + at, mean + p, scale + p, points, eps, own);
        else
            strange += plane_standardise(x + at, NULL, NULL, y + at, mean + p, scale + p, points, eps, own);
    }
    return strange;
}

/* y <- gelu of the standardised (key + a) (query + b), plus bias, of a plane; y may be key. Returns 1, with the product in
   y, if its variance is not finite. */
INLINE int plane_gate(const float *key, const float *query, float a, float b, const float *bias, float *y, float *scale,
                      long points, float eps) {
    float mean;
#pragma omp simd
    for (long i = 0; i < points; i++) y[i] = (key[i] + a) * (query[i] + b);
    return plane_standardise(y, NULL, bias, y, &mean, scale, points, eps, 1);
}

/* The same of many planes: key, query and y (planes, points), key_bias and query_bias (chans), bias (points), scale
   (planes). Returns how many were left at their products, with a scale of 0. */
long gate(const float *key, const float *query, const float *key_bias, const float *query_bias, const float *bias,
          float *y, float *scale, long planes, long chans, long points, float eps) {
    long strange = 0;
#pragma omp parallel for schedule(static) reduction(+ : strange)
    for (long p = 0; p < planes; p++) {
        long at = p * points;
        strange += plane_gate(key + at, query + at, key_bias[p % chans], query_bias[p % chans], bias, y + at, scale + p,
                              points, eps);
    }
    return strange;
}

static inline float sigmoid(float x) {
    float small = capped_exponential(-fabsf(x));
    return (x < 0 ? small : 1) / (1 + small);
}

/* out <- x sigmoid(along m^2 across s^2), with m the mean of every plane of y and s that of every pixel over the planes
   of its sample.
   y, x and out (batch, chans, points), along (chans), across (points). */
void hyper_interaction(const float *y, const float *x, const float *along, const float *across, float *out, long batch,
                       long chans, long points) {
    float *plane = malloc(batch * chans * sizeof(float)), *pixel = malloc(batch * points * sizeof(float));
    long parts = (points + 255) / 256;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (long p = 0; p < batch * chans; p++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (long i = 0; i < points; i++) sum += y[p * points + i];
            plane[p] = along[p % chans] * (sum / points) * (sum / points);
        }
#pragma omp for schedule(static)
        for (long part = 0; part < batch * parts; part++) {
            long sample = part / parts, from = part % parts * 256, to = least(from + 256, points);
            float *sum = pixel + sample * points;
            memset(sum + from, 0, (to - from) * sizeof(float));
            for (long c = 0; c < chans; c++) {
                const float *row = y + (sample * chans + c) * points;
#pragma omp simd
                for (long i = from; i < to; i++) sum[i] += row[i];
            }
#pragma omp simd
            for (long i = from; i < to; i++) sum[i] = across[i] * (sum[i] / chans) * (sum[i] / chans);
        }
#pragma omp for schedule(static)
        for (long p = 0; p < batch * chans; p++) {
            const float *score = pixel + p / chans * points;
#pragma omp simd
            for (long i = 0; i < points; i++) out[p * points + i] = x[p * points + i] * sigmoid(plane[p] * score[i]);
        }
    }
    free(plane);
    free(pixel);
}

/* y <- the standardised x sigmoid(along m^2), with m the mean of every plane of x; x_mean and y_mean <- the means of x and
   y over the batch.
   x and y (batch, chans, points), along (chans), x_mean and y_mean (chans, points). Returns how many planes have a
   variance that is not finite. */
long channel_interaction(const float *x, const float *along, float *y, float *x_mean, float *y_mean, long batch,
                         long chans, long points, float eps) {
    long strange = 0;
#pragma omp parallel for schedule(static) reduction(+ : strange)
    for (long c = 0; c < chans; c++) {
        float *of_x = x_mean + c * points, *of_y = y_mean + c * points, share = 1.0f / batch;
        memset(of_x, 0, points * sizeof(float));
        memset(of_y, 0, points * sizeof(float));
        for (long b = 0; b < batch; b++) {
            const float *from = x + (b * chans + c) * points;
            float *to = y + (b * chans + c) * points, mean, var;
            plane_moments(from, NULL, points, &mean, &var);
            float factor = sigmoid(along[c] * mean * mean); /* one for the plane: it scales the moments */
            float scale = factor / sqrtf(factor * factor * var + eps);
            strange += !is_variance(var);
#pragma omp simd
            for (long i = 0; i < points; i++) {
                to[i] = (from[i] - mean) * scale;
                of_x[i] += from[i] * share;
                of_y[i] += to[i] * share;
            }
        }
    }
    return strange;
}

/* d_x <- gradient of x, and d_times of times, with flat and tilt the means of the gradient of the standardised z and of
   that times z. */
INLINE void plane_gradient(const float *x, const float *times, float mean, float scale, float flat, float tilt,
                           float *d_x, float *d_times, long points) {
#pragma omp simd
    for (long i = 0; i < points; i++) {
        float z = (product_of(x, times, i) - mean) * scale, slope = scale * (d_x[i] - flat - tilt * z);
        if (times) d_times[i] = slope * x[i];
        d_x[i] = times ? slope * times[i] : slope;
    }
}

INLINE void plane_slopes(const float *x, const float *times, float mean, float scale, const float *grad, float *d_x,
                         float *d_times, float *flat, float *tilt, long points, long own, long activate) {
    float sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
    for (long i = 0; i < points; i++) {
        float z = (product_of(x, times, i) - mean) * scale, slope = activate ? grad[i] * gelu_slope(z) : grad[i];
        d_x[i] = slope;
        sum += slope;
        dot += slope * z;
    }
    *flat = sum / points;
    *tilt = dot / points;
    if (own && !all_finite(flat, 1)) *flat = NAN; /* as in the library's order of sums */
    if (own) plane_gradient(x, times, mean, scale, *flat, *tilt, d_x, d_times, points);
}

/* First half of the gradient of `standardise`, and all of it with its own moments; gelu if asked.
   x, times (or NULL), grad, d_x and d_times (planes, points); mean, scale, flat and tilt (planes). */
void standardise_slopes(const float *x, const float *times, const float *mean, const float *scale, const float *grad,
                        float *d_x, float *d_times, float *flat, float *tilt, long planes, long points, long own,
                        long activate) {
#pragma omp parallel for schedule(static)
    for (long p = 0; p < planes; p++) {
        long at = p * points;
        if (times)
            plane_slopes(x + at, times + at, mean[p], scale[p], grad + at, d_x + at, d_times + at, flat + p, tilt + p,
                         points, own, 1);
        else if (activate)
            plane_slopes(x + at, NULL, mean[p], scale[p], grad + at, d_x + at, NULL, flat + p, tilt + p, points, own,
                         1);
        else
            plane_slopes(x + at, NULL, mean[p], scale[p], grad + at, d_x + at, NULL, flat + p, tilt + p, points, own,
                         0);
    }
}

/* Second half, for moments that planes share: flat and tilt are now means over all of those. */
void standardise_gradient(const float *x, const float *mean, const float *scale, const float *flat, const float *tilt,
                          float *d_x, long planes, long points) {
#pragma omp parallel for schedule(static)
    for (long p = 0; p < planes; p++)
        plane_gradient(x + p * points, NULL, mean[p], scale[p], flat[p], tilt[p], d_x + p * points, NULL, points);
}

/* ---- depthwise convolution of planes ---- */

enum { HIGH = 4, WIDE = 2 }; /* rows, and vectors of neighbouring pixels, of the output that are summed at once */

/* Pixels of one row meet the rows of taps that output rows `from` to `to` have for them; `taps` is that of row 0. */
INLINE void meet(const float *pixels, const float *taps, lanes sum[HIGH][WIDE], long k_w, const int from,
                 const int to) {
    for (long k_x = 0; k_x < k_w; k_x++) {
        lanes pixel[WIDE];
        for (int s = 0; s < WIDE; s++) pixel[s] = *(const anywhere *)(pixels + k_x + s * LANES);
        for (int r = from; r <= to; r++)
            for (int s = 0; s < WIDE; s++) sum[r][s] += taps[k_x - r * k_w] * pixel[s];
    }
}

#define MEET(from, to)                                                                                                 \
    case from * HIGH + to: meet(pixels, tap, sum, k_w, from, to); break;

/* A plane with zeros on its left and right. */
static void copy_plane(const float *x, float *map, long height, long width, long padded, long left) {
    for (long i = 0; i < height; i++) {
        const float *from = x + i * width;
        float *to = map + i * padded + left;
        if (width % LANES)
            memcpy(to, from, width * sizeof(float));
        else
            for (long j = 0; j < width; j += LANES) *(anywhere *)(to + j) = *(const anywhere *)(from + j);
    }
}

/* The first `count` numbers of some vectors. */
INLINE void put(const lanes *sum, float *y, long count) {
    if (count < WIDE * LANES)
        memcpy(y, sum, count * sizeof(float));
    else
        for (int s = 0; s < WIDE; s++) *(anywhere *)(y + s * LANES) = sum[s];
}

/* Depthwise convolution of one plane, padded to `map` on all sides. */
static void plane(const float *map, const float *kernel, float *y, long height, long width, long padded, long k_h,
                  long k_w) {
    long top = k_h / 2;
    for (long i = 0; i < height; i += HIGH) {
        for (long j = 0; j < width; j += WIDE * LANES) {
            lanes sum[HIGH][WIDE] = {{{0}}};
            for (long k_y = i < top ? top - i : 0; k_y < k_h + HIGH - 1 && i + k_y - top < height; k_y++) {
                const float *pixels = map + (i + k_y) * padded + j, *tap = kernel + k_y * k_w;
                switch ((k_y < k_h ? 0 : k_y - k_h + 1) * HIGH + least(k_y, HIGH - 1)) {
                    MEET(0, 3) MEET(0, 2) MEET(0, 1) MEET(0, 0) MEET(1, 3)
                    MEET(1, 2) MEET(1, 1) MEET(2, 3) MEET(2, 2) MEET(3, 3)
                }
            }
            for (long r = 0; r < least(HIGH, height - i); r++) put(sum[r], y + (i + r) * width + j, width - j);
        }
    }
}

/* The same for a square kernel of constant size, without a branch: rows of zeros are summed too. */
INLINE void small_plane(const float *map, const float *kernel, float *y, long height, long width, long padded,
                        const int k) {
    for (long i = 0; i < height; i += HIGH) {
        for (long j = 0; j < width; j += WIDE * LANES) {
            lanes sum[HIGH][WIDE] = {{{0}}};
#pragma GCC unroll 16
            for (int k_y = 0; k_y < k + HIGH - 1; k_y++) {
                const float *pixels = map + (i + k_y) * padded + j;
#pragma GCC unroll 2
                for (int k_x = 0; k_x < k; k_x++) {
                    lanes pixel[WIDE];
                    for (int s = 0; s < WIDE; s++) pixel[s] = *(const anywhere *)(pixels + k_x + s * LANES);
#pragma GCC unroll 16
                    for (int r = 0; r < HIGH; r++)
                        if (r <= k_y && k_y - r < k)
                            for (int s = 0; s < WIDE; s++) sum[r][s] += kernel[(k_y - r) * k + k_x] * pixel[s];
                }
            }
            for (long r = 0; r < least(HIGH, height - i); r++) put(sum[r], y + (i + r) * width + j, width - j);
        }
    }
}

/* What a depthwise convolution of planes works in: the plane between zeros. */
typedef struct { long height, width, k_h, k_w, padded; float *map; } frame;

static frame new_frame(long height, long width, long k_h, long k_w) {
    long strip = WIDE * LANES, padded = (width + strip - 1) / strip * strip + k_w / 2 * 2;
    long rows = (height + HIGH - 1) / HIGH * HIGH + k_h - 1;
    return (frame){height, width, k_h, k_w, padded, (float *)zeros((rows * padded + LANES - 1) / LANES)};
}

static void convolve(const frame *f, const float *x, const float *taps, float *y) {
    copy_plane(x, f->map + f->k_h / 2 * f->padded, f->height, f->width, f->padded, f->k_w / 2);
    switch (f->k_h == f->k_w ? f->k_h : 0) {
        case 3: small_plane(f->map, taps, y, f->height, f->width, f->padded, 3); break;
        case 5: small_plane(f->map, taps, y, f->height, f->width, f->padded, 5); break;
        case 7: small_plane(f->map, taps, y, f->height, f->width, f->padded, 7); break;
        case 9: small_plane(f->map, taps, y, f->height, f->width, f->padded, 9); break;
        default: plane(f->map, taps, y, f->height, f->width, f->padded, f->k_h, f->k_w);
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

/* ---- products over channels: y <- sum over parts of w x, for planes ---- */

#ifdef __AVX512F__
enum { TOWER = 2 * TALL }; /* rows at once: there are twice as many registers */
#else
enum { TOWER = TALL };
#endif
enum { STRETCH = 512 }; /* pixels at a time: the second cache holds DEEP numbers of each */

/* Some rows of w, `down` apart, times a panel of pixels (terms, SIDE) are written to y or added to it. */
INLINE void mix_rows(const float *w, long down, const lanes *panel, long terms, float *y, long step, long width,
                     int more, const int tall) {
    lanes sum[TOWER][BROAD];
    sum_rows((matrix){w, down, 1}, panel, terms, sum, tall);
    for (int r = 0; r < tall; r++, y += step) {
        if (width < SIDE) {
            const float *sums = (const float *)sum[r];
            for (long j = 0; j < width; j++) y[j] = more ? y[j] + sums[j] : sums[j];
        } else {
            for (int s = 0; s < BROAD; s++) {
                anywhere *to = (anywhere *)(y + s * LANES);
                *to = more ? *to + sum[r][s] : sum[r][s];
            }
        }
    }
}

/* The same of at most TOWER rows, `left`, whatever the width. */
static void mix_tower(const float *w, long down, const lanes *panel, long terms, float *y, long step, long width,
                      int more, long left) {
    if (left >= TOWER && width == SIDE) {
        mix_rows(w, down, panel, terms, y, step, width, more, TOWER);
        return;
    }
    for (long i = 0; i < least(left, TOWER); i += TALL)
        WITH_TALL(left - i, mix_rows(w + i * down, down, panel, terms, y + i * step, step, width, more, tall))
}

/* A part of a sum over channels: w (rows, terms), `down` from row to row, x (terms, points). */
typedef struct { const float *w; long down; const float *x; long terms; } part;

/* y (rows, points) <- (y +) w x, of pixels `from` to `to`. panels: working memory of DEEP STRETCH numbers. */
static void mix_part(const part *p, float *y, long rows, long points, long from, long to, int more, float *panels) {
    for (long l = 0; l < p->terms; l += DEEP) {
        long deep = least(p->terms - l, DEEP);
        for (long k = 0; k < deep; k++) {
            const float *pixels = p->x + (l + k) * points;
            for (long j = from; j < to; j += SIDE) {
                lanes *panel = (lanes *)(panels + (j - from) * deep + k * SIDE);
                if (to - j < SIDE) {
                    memset(panel, 0, SIDE * sizeof(float));
                    memcpy(panel, pixels + j, (to - j) * sizeof(float));
                } else {
                    for (int s = 0; s < BROAD; s++) panel[s] = *(const anywhere *)(pixels + j + s * LANES);
                }
            }
        }
        for (long i = 0; i < rows; i += TOWER)
            for (long j = from; j < to; j += SIDE)
                mix_tower(p->w + i * p->down + l, p->down, (lanes *)(panels + (j - from) * deep), deep,
                          y + i * points + j, points, least(to - j, SIDE), more || l > 0, rows - i);
    }
}

static float *new_numbers(long count) { return (float *)aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64); }

/* Every row of y (rows, points) <- its bias. */
static void fill_rows(const float *bias, float *y, long rows, long points) {
    for (long i = 0; i < rows; i++)
        for (long j = 0; j < points; j++) y[i * points + j] = bias[i];
}

/* y (rows, points) <- (y +) the sum over parts of w x. */
static void mix_sample(const part *parts, long count, float *y, long rows, long points, int more, float *panels) {
    for (long from = 0; from < points; from += STRETCH)
        for (long p = 0; p < count; p++)
            mix_part(parts + p, y, rows, points, from, least(from + STRETCH, points), more || p > 0, panels);
}

/* Some rows of y <- w z, as many columns as there are in WIDE vectors; `step` from row to row of z. */
INLINE void square_rows(const float *w, const float *z, float *y, long side, long step, long cols, const int rows) {
    lanes sum[HIGH][WIDE] = {{{0}}};
    for (long k = 0; k < side; k++) {
        lanes row[WIDE];
        for (int s = 0; s < WIDE; s++) row[s] = *(const anywhere *)(z + k * step + s * LANES);
        for (int r = 0; r < rows; r++)
            for (int s = 0; s < WIDE; s++) sum[r][s] += w[r * side + k] * row[s];
    }
    for (int r = 0; r < rows; r++) put(sum[r], y + r * side, cols);
}

/* y <- w z for square matrices; `panel` has room for the last columns of z. */
static void square_product(const float *w, const float *z, float *y, long side, lanes *panel) {
    for (long j = 0; j < side; j += WIDE * LANES) {
        long cols = least(WIDE * LANES, side - j), step = side, i = 0;
        const float *from = z + j;
        if (cols < WIDE * LANES) {
            for (long k = 0; k < side; k++) memcpy(panel + k * WIDE, z + k * side + j, cols * sizeof(float));
            from = (const float *)panel, step = WIDE * LANES;
        }
        for (; i + HIGH <= side; i += HIGH) square_rows(w + i * side, from, y + i * side + j, side, step, cols, HIGH);
        for (; i < side; i++) square_rows(w + i * side, from, y + i * side + j, side, step, cols, 1);
    }
}

/* y[0] to y[2] + at <- products of the plane w with three of z + at, and y[3] + at <- silu of the first. */
static void plane_products(const float *w, const float *const z[3], float *const y[4], long at, long side,
                           lanes *panel) {
    for (int i = 0; i < 3; i++) square_product(w, z[i] + at, y[i] + at, side, panel);
#pragma omp simd
    for (long i = at; i < at + side * side; i++) y[3][i] = y[0][i] * sigmoid(y[0][i]);
}

/* The same of many planes: all (planes, side, side). */
void global_products(const float *w, const float *z1, const float *z2, const float *z3, float *y1, float *y2, float *y3,
                     float *silu, long planes, long side) {
#pragma omp parallel
    {
        lanes *panel = zeros(side * WIDE);
#pragma omp for schedule(static)
        for (long p = 0; p < planes; p++) {
            long at = p * side * side;
            plane_products(w + at, (const float *[]){z1, z2, z3}, (float *[]){y1, y2, y3, silu}, at, side, panel);
        }
        free(panel);
    }
}

/* total[s] += the gradient of tap (k_y, k_x + s), lane by lane, for `strip` neighbouring taps at once. */
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

/* Gradient of the taps of `depthwise_planes`, a part of the batch at a time.
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

/* ---- Gaussian units: exp(-|L^T (x - c)|^2 / 2) ---- */

INLINE void product_rows(matrix a, const lanes *b, float *out, long terms, long step, long width, const int tall) {
    lanes sum[TALL][BROAD];
    sum_rows(a, b, terms, sum, tall);
    for (int r = 0; r < tall; r++) {
        const float *sums = (const float *)sum[r];
        for (long j = 0; j < width; j++) out[r * step + j] += sums[j];
    }
}

/* out (rows, cols) += a b, over so many terms. Of a lower triangle b only that is read; of a lower triangle out only
   that is promised. */
static void product(matrix a, matrix b, float *out, long rows, long terms, long cols, long b_lower, long out_lower) {
    lanes side[DEEP * BROAD];
    for (long j = 0; j < cols; j += SIDE) {
        long width = cols - j < SIDE ? cols - j : SIDE;
        if (width < SIDE) memset(side, 0, sizeof(side));
        for (long first = b_lower ? j : 0; first < terms; first += DEEP) {
            long deep = terms - first < DEEP ? terms - first : DEEP;
            for (long l = 0; l < deep; l++) {
                const float *row = b.at + (first + l) * b.down + j * b.right;
                if (b.right == 1 && width == SIDE)
                    memcpy(side + l * BROAD, row, SIDE * sizeof(float));
                else
                    for (long c = 0; c < width; c++) ((float *)side)[l * SIDE + c] = row[c * b.right];
            }
            for (long i = out_lower ? j : 0; i < rows; i += TALL) {
                matrix some = {a.at + i * a.down + first * a.right, a.down, a.right};
                WITH_TALL(rows - i, product_rows(some, side, out + i * cols + j, deep, cols, width, tall))
            }
        }
    }
}

/* ---- a local slow network, on the few points of its kernel ---- */

/* y <- the means of x over the windows of a coarser grid: (planes, height, width) to (planes, k_h, k_w). */
void adaptive_mean(const float *x, float *y, long planes, long height, long width, long k_h, long k_w) {
    long *left = malloc(2 * k_w * sizeof(long)), *right = left + k_w;
    float *row = malloc(width * sizeof(float));
    for (long j = 0; j < k_w; j++) left[j] = j * width / k_w, right[j] = ((j + 1) * width + k_w - 1) / k_w;
    for (long i = 0; i < k_h; i++) {
        long top = i * height / k_h, bottom = ((i + 1) * height + k_h - 1) / k_h;
        for (long p = 0; p < planes; p++) {
            const float *from = x + (p * height + top) * width;
            memcpy(row, from, width * sizeof(float));
            for (long r = 1; r < bottom - top; r++) {
#pragma omp simd
                for (long j = 0; j < width; j++) row[j] += from[r * width + j];
            }
            for (long j = 0; j < k_w; j++) {
                float sum = 0;
                for (long l = left[j]; l < right[j]; l++) sum += row[l];
                y[(p * k_h + i) * k_w + j] = sum / ((bottom - top) * (right[j] - left[j]));
            }
        }
    }
    free(left);
    free(row);
}

/* A linear layer: y (outs, points) <- w (outs, ins) x (ins, points) + bias (outs). */
static void dense(const float *w, const float *bias, const float *x, float *y, long outs, long ins, long points) {
    fill_rows(bias, y, outs, points);
    product((matrix){w, ins, 1}, (matrix){x, points, 1}, y, outs, ins, points, 0, 0);
}

/* taps (chans, points) <- what a local slow network makes of a context (chans, points) and of all that no context
   changes, start (layers, hidden, points). w: weight and bias of ctx_reduce, of ctx_fc, for every layer of mix and
   ctx_mix, of out; pos_bias (points). */
void local_kernel(const float *context, const float *start, const float **w, float *taps, long chans, long hidden,
                  long layers, long points) {
    long size = hidden * points;
    float *c = malloc(3 * size * sizeof(float)), *h = c + size, *mixed = h + size;
    const float **out = w + 4 * (layers + 1), *pos_bias = out[2];
    dense(w[0], w[1], context, mixed, hidden, chans, points);
    dense(w[2], w[3], mixed, c, hidden, hidden, points);
    for (long i = 0; i < size; i++) c[i] = gelu(c[i]);
    memcpy(h, start, size * sizeof(float)); /* layer 1 came through `mix` before */
    for (long layer = 0; layer < layers; layer++) {
        const float **own = w + 4 * (layer + 1);
        if (layer > 0) {
            dense(own[0], own[1], h, mixed, hidden, hidden, points);
            for (long row = 0; row < size; row += points) {
                const float *wave = start + layer * size + row;
                float squares = 0;
#pragma omp simd reduction(+ : squares)
                for (long i = 0; i < points; i++) {
                    h[row + i] = wave[i] * mixed[row + i] + pos_bias[i];
                    squares += h[row + i] * h[row + i];
                }
                float norm = sqrtf(squares), more = 1 + 0.1f / (norm < 1e-12f ? 1e-12f : norm);
                for (long i = 0; i < points; i++) h[row + i] *= more;
            }
        }
        dense(own[2], own[3], c, mixed, hidden, hidden, points);
        for (long i = 0; i < size; i++) h[i] *= mixed[i];
    }
    dense(out[0], out[1], h, taps, chans, hidden, points);
    free(c);
}

/* ---- a block of a slow-fast network, sample by sample, so that what one step makes is at hand for the next ---- */

/* A recursive gated unit without its last layer: weights (chans, chans), biases (chans), pos (points). */
typedef struct { const float *key, *key_bias, *value, *value_bias, *query, *query_bias, *pos; } gated_unit;

typedef struct {
    const float *mixer, *kernel; /* kernel (chans, points) */
    gated_unit slow, fast;
    const float *slow_y, *fast_y, *along, *across, *bias; /* along (chans), across (points), bias (rows) or NULL */
} global_weights;

/* Its second factor as one linear layer, some rows: joint <- query value and, behind (chans, chans), the bias. */
static void join_rows(const gated_unit *unit, float *joint, long chans, long from, long to) {
    memset(joint + from * chans, 0, (to - from) * chans * sizeof(float));
    product((matrix){unit->query + from * chans, chans, 1}, (matrix){unit->value, chans, 1}, joint + from * chans,
            to - from, chans, chans, 0, 0);
    for (long c = from; c < to; c++) {
        float sum = unit->query_bias[c];
        for (long l = 0; l < chans; l++) sum += unit->query[c * chans + l] * unit->value_bias[l];
        joint[chans * chans + c] = sum;
    }
}

/* key <- its gate for x; query is working memory. All (chans, points). */
static int gate_sample(const gated_unit *unit, const float *joint, const float *x, float *key, float *query,
                        long chans, long points, float *panels) {
    const float *bias = joint + chans * chans;
    mix_sample(&(part){unit->key, chans, x, chans}, 1, key, chans, points, 0, panels);
    mix_sample(&(part){joint, chans, x, chans}, 1, query, chans, points, 0, panels);
    float scale;
    int strange = 0;
    for (long c = 0; c < chans; c++) {
        long at = c * points;
        strange += plane_gate(key + at, query + at, unit->key_bias[c], bias[c], unit->pos, key + at, &scale, points,
                              1e-5f);
    }
    return strange;
}

static int standardise_sample(float *x, long chans, long points) {
    float mean, scale;
    int strange = 0;
    for (long c = 0; c < chans; c++)
        strange += plane_standardise(x + c * points, NULL, NULL, x + c * points, &mean, &scale, points, 1e-5f, 1);
    return strange;
}

/* mixed <- the standardised mixer x; y <- what the bottleneck makes of all but the local branches.
   x, hci and mixed (batch, chans, side, side), y (batch, rows, side, side); columns of the bottleneck, (rows, their
   channels), and `down` from row to row, for fast, hi, the three products, silu, and `earlier` outputs, which are
   (batch, widths, side, side). Returns how many planes had a variance that is not finite on the way. */
long global_part(const global_weights *w, const float *x, const float *hci, const float **before, const float **columns,
                 const long *down, const long *widths, float *mixed, float *y, long batch, long chans, long rows,
                 long side, long earlier) {
    enum { MAPS = 6, PARTS = MAPS + 2 };
    long points = side * side, size = chans * points;
    float *slow_joint = new_numbers(2 * chans * (chans + 1)), *fast_joint = slow_joint + chans * (chans + 1);
    long strange = 0;
#pragma omp parallel reduction(+ : strange)
    {
#pragma omp for schedule(static)
        for (long c = 0; c < chans; c += TALL) {
            join_rows(&w->slow, slow_joint, chans, c, least(c + TALL, chans));
            join_rows(&w->fast, fast_joint, chans, c, least(c + TALL, chans));
        }
        float *panels = new_numbers(DEEP * STRETCH), *memory = new_numbers(MAPS * size + chans + points);
        float *fast = memory, *hi = fast + size, *found[4] = {hi + size, hi + 2 * size, hi + 3 * size, hi + 4 * size};
        float *plane = memory + MAPS * size, *pixel = plane + chans, *context = found[0];
        lanes *panel = zeros(side * WIDE);
#pragma omp for schedule(dynamic)
        for (long b = 0; b < batch; b++) {
            const float *own = x + b * size, *of_hci = hci + b * size;
            float *of_mix = mixed + b * size, *out = y + b * rows * points;
            mix_sample(&(part){w->mixer, chans, own, chans}, 1, of_mix, chans, points, 0, panels);
            strange += standardise_sample(of_mix, chans, points);

            for (long i = 0; i < size; i++) context[i] = own[i] * w->kernel[i];
            strange += gate_sample(&w->slow, slow_joint, context, found[1], found[2], chans, points, panels);
            strange += gate_sample(&w->fast, fast_joint, own, found[3], found[2], chans, points, panels);
            part gates[2] = {{w->slow_y, chans, found[1], chans}, {w->fast_y, chans, found[3], chans}};
            mix_sample(gates, 2, fast, chans, points, 0, panels);
            strange += standardise_sample(fast, chans, points);

            memset(pixel, 0, points * sizeof(float));
            for (long c = 0; c < chans; c++) {
                long at = c * points;
                memcpy(hi, context + at, points * sizeof(float)); /* its place is that of the first product */
                plane_products(hi, (const float *[]){fast, of_mix, of_hci}, found, at, side, panel);
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (long i = 0; i < points; i++) {
                    sum += found[0][at + i];
                    pixel[i] += found[0][at + i];
                }
                plane[c] = w->along[c] * (sum / points) * (sum / points);
            }
            for (long i = 0; i < points; i++) pixel[i] = w->across[i] * (pixel[i] / chans) * (pixel[i] / chans);
            for (long c = 0; c < chans; c++) {
#pragma omp simd
                for (long i = 0; i < points; i++)
                    hi[c * points + i] = own[c * points + i] * sigmoid(plane[c] * pixel[i]);
            }

            part parts[PARTS];
            const float *maps[MAPS] = {fast, hi, found[0], found[1], found[2], found[3]};
            for (long p = 0; p < MAPS + earlier; p++)
                parts[p] = (part){columns[p], down[p], p < MAPS ? maps[p] : before[p - MAPS] + b * widths[p] * points,
                                  widths[p]};
            if (w->bias) fill_rows(w->bias, out, rows, points);
            mix_sample(parts, MAPS + earlier, out, rows, points, w->bias != NULL, panels);
        }
        free(panels);
        free(memory);
        free(panel);
    }
    free(slow_joint);
    return strange;
}

/* z <- w of the depthwise convolution of x, plus bias (or NULL), for every branch; mean and var <- moments of z.
   A branch has x and z (batch, chans, height, width), taps (chans, k_h, k_w), w (chans, chans), bias (chans), mean and
   var (batch, chans). Returns 1, and does nothing, if a tap is not finite. */
long local_branches(const float **x, const float **taps, const float **w, const float **bias, float **z, float **mean,
                    float **var, const long *k_h, const long *k_w, long branches, long batch, long chans, long height,
                    long width) {
    long points = height * width, size = chans * points;
    for (long j = 0; j < branches; j++)
        if (!all_finite(taps[j], chans * k_h[j] * k_w[j])) return 1;
#pragma omp parallel
    {
        float *panels = new_numbers(DEEP * STRETCH), *map = new_numbers(size);
#pragma omp for schedule(dynamic)
        for (long task = 0; task < branches * batch; task++) {
            long j = task / batch, b = task % batch;
            frame f = new_frame(height, width, k_h[j], k_w[j]);
            float *out = z[j] + b * size;
            for (long c = 0; c < chans; c++)
                convolve(&f, x[j] + b * size + c * points, taps[j] + c * k_h[j] * k_w[j], map + c * points);
            free(f.map);
            if (bias[j]) fill_rows(bias[j], out, chans, points);
            mix_sample(&(part){w[j], chans, map, chans}, 1, out, chans, points, bias[j] != NULL, panels);
            for (long c = 0; c < chans; c++)
                plane_moments(out + c * points, NULL, points, mean[j] + b * chans + c, var[j] + b * chans + c);
        }
        free(panels);
        free(map);
    }
    return 0;
}

/* y <- y + the sum over branches of w (gelu of the standardised z, plus bias); z is overwritten.
   A branch has z (batch, chans, points), mean and scale (batch, chans), bias (1), w (rows, chans), `down` from row to row;
   y (batch, rows, points). */
void local_outputs(float **z, const float **mean, const float **scale, const float **bias, const float **w,
                   const long *down, float *y, long branches, long batch, long chans, long rows, long points) {
    long stretches = (points + STRETCH - 1) / STRETCH, size = chans * points;
#pragma omp parallel
    {
        float *panels = new_numbers(DEEP * STRETCH);
#pragma omp for schedule(dynamic)
        for (long task = 0; task < batch * stretches; task++) {
            long b = task / stretches, from = task % stretches * STRETCH, to = least(from + STRETCH, points);
            for (long j = 0; j < branches; j++) {
                float more = *bias[j];
                for (long c = 0; c < chans; c++) {
                    float middle = mean[j][b * chans + c], factor = scale[j][b * chans + c];
                    float *values = z[j] + b * size + c * points;
#pragma omp simd
                    for (long i = from; i < to; i++) values[i] = gelu((values[i] - middle) * factor) + more;
                }
                mix_part(&(part){w[j], down[j], z[j] + b * size, chans}, y + b * rows * points, rows, points, from, to, 1,
                         panels);
            }
        }
        free(panels);
    }
}

/* The factor L (dim, rank) with all its entries; its lower triangle may be packed, row by row. To be freed. */
static float *whole_factor(const float *factor, long dim, long rank, long packed) {
    float *whole = calloc(dim * rank, sizeof(float));
    for (long i = 0; i < dim; i++) {
        long width = packed ? i + 1 : rank;
        memcpy(whole + i * rank, factor, width * sizeof(float));
        factor += width;
    }
    return whole;
}

/* near <- points - origin, in_metric <- near L, half[i] <- half of the square of row i. */
static void to_metric(const float *points, const float *origin, const float *L, float *near, float *in_metric,
                      float *half, long count, long dim, long rank, long packed) {
    for (long i = 0; i < count; i++)
        for (long d = 0; d < dim; d++) near[i * dim + d] = points[i * dim + d] - origin[d];
    memset(in_metric, 0, count * rank * sizeof(float));
    product((matrix){near, dim, 1}, (matrix){L, rank, 1}, in_metric, count, dim, rank, packed, 0);
    for (long i = 0; i < count; i++) {
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (long r = 0; r < rank; r++) squares += in_metric[i * rank + r] * in_metric[i * rank + r];
        half[i] = 0.5f * squares;
    }
}

/* phi (points, units), and what its derivatives need: x and centers (.., dim) with the origin moved into the centres,
   z and k (.., rank) in the coordinates of the metric. Returns 1, without kernel values, if points or centres lie so far
   out that differences between them would lose digits. */
long gaussian_units(const float *x, const float *centers, const float *factor, float *phi, float *near_x,
                    float *near_centers, float *z, float *k, long points, long units, long dim, long rank, long packed) {
    float *L = whole_factor(factor, dim, rank, packed), *origin = calloc(dim, sizeof(float));
    float *half_z = malloc((points + units) * sizeof(float)), *half_k = half_z + points;
    for (long m = 0; m < units; m++)
        for (long d = 0; d < dim; d++) origin[d] += centers[m * dim + d];
    for (long d = 0; d < dim; d++) origin[d] /= units;
    to_metric(x, origin, L, near_x, z, half_z, points, dim, rank, packed);
    to_metric(centers, origin, L, near_centers, k, half_k, units, dim, rank, packed);
    int far = 0; /* also if something is infinite or no number: zeros of a triangle would meet it */
    for (long i = 0; i < points + units; i++) far |= !(half_z[i] <= 32);
    if (far) {
        free(L), free(origin), free(half_z);
        return 1;
    }
    for (long n = 0; n < points; n++)
        for (long m = 0; m < units; m++) phi[n * units + m] = -half_z[n] - half_k[m];
    product((matrix){z, rank, 1}, (matrix){k, 1, rank}, phi, points, rank, units, 0, 0);
#pragma omp simd
    for (long i = 0; i < points * units; i++)
        phi[i] = capped_exponential(phi[i]); /* rounding may leave a distance just below zero */
    free(L);
    free(origin);
    free(half_z);
    return 0;
}

/* d_x and d_centers (zeros at first, or NULL) and d_factor, as it is stored, from the gradient of phi and from what
   `gaussian_units` found. With r = grad phi: d_z = r k - (r 1) z, d_k = r^T z - (r^T 1) k, d_L = x^T d_z + centers^T d_k. */
void gaussian_units_gradient(const float *grad, const float *phi, const float *x, const float *centers, const float *z,
                             const float *k, const float *factor, float *d_x, float *d_centers, float *d_factor,
                             long points, long units, long dim, long rank, long packed) {
    float *r = malloc(points * units * sizeof(float)), *of_units = calloc(units, sizeof(float));
    float *d_z = malloc((points + units) * rank * sizeof(float)), *d_k = d_z + points * rank;
    for (long n = 0; n < points; n++) {
        float of_point = 0;
#pragma omp simd reduction(+ : of_point)
        for (long m = 0; m < units; m++) {
            float value = grad[n * units + m] * phi[n * units + m];
            r[n * units + m] = value;
            of_point += value;
            of_units[m] += value;
        }
        for (long j = 0; j < rank; j++) d_z[n * rank + j] = -of_point * z[n * rank + j];
    }
    for (long m = 0; m < units; m++)
        for (long j = 0; j < rank; j++) d_k[m * rank + j] = -of_units[m] * k[m * rank + j];
    product((matrix){r, units, 1}, (matrix){k, rank, 1}, d_z, points, units, rank, 0, 0);
    product((matrix){r, 1, units}, (matrix){z, rank, 1}, d_k, units, points, rank, 0, 0);

    float *L = whole_factor(factor, dim, rank, packed);
    if (d_x) product((matrix){d_z, rank, 1}, (matrix){L, 1, rank}, d_x, points, rank, dim, 0, 0);
    if (d_centers) product((matrix){d_k, rank, 1}, (matrix){L, 1, rank}, d_centers, units, rank, dim, 0, 0);
    memset(L, 0, dim * rank * sizeof(float)); /* now its gradient */
    product((matrix){x, 1, dim}, (matrix){d_z, rank, 1}, L, dim, points, rank, 0, packed);
    product((matrix){centers, 1, dim}, (matrix){d_k, rank, 1}, L, dim, units, rank, 0, packed);
    for (long i = 0; i < dim; i++) {
        long width = packed ? i + 1 : rank;
        memcpy(d_factor, L + i * rank, width * sizeof(float));
        d_factor += width;
    }
    free(r);
    free(of_units);
    free(d_z);
    free(L);
}

/* ---- perceptrons with dropout: h (rows, cols) */

static inline uint32_t scattered(uint32_t x) { /* every bit of x changes half of the bits of the result */
    x ^= x >> 16;
    x *= 0x85ebca6bu;
    x ^= x >> 13;
    x *= 0xc2b2ae35u;
    return x ^ x >> 16;
}

/* h <- scale times what ReLU and dropout leave of h + bias: number i is dropped, times 0, where scattered(seed + i) is
   below the bar. */
void relu_dropout(float *h, const float *bias, long rows, long cols, float scale, long bar, long seed) {
    for (long row = 0; row < rows; row++) {
        float *values = h + row * cols;
        uint32_t first = (uint32_t)seed + (uint32_t)(row * cols);
#pragma omp simd
        for (long i = 0; i < cols; i++) {
            float value = values[i] + bias[i];
            float share = scattered(first + (uint32_t)i) >= (uint32_t)bar ? scale : 0;
            values[i] = (value < 0 ? 0 : value) * share;
        }
    }
}

/* grad <- scale times what passes where h is not 0 or less; total (cols) <- its sums down the rows. */
void relu_slopes(float *grad, const float *h, float *total, long rows, long cols, float scale) {
    memset(total, 0, cols * sizeof(float));
    for (long row = 0; row < rows; row++) {
        float *slopes = grad + row * cols;
        const float *values = h + row * cols;
#pragma omp simd
        for (long i = 0; i < cols; i++) {
            slopes[i] = values[i] <= 0 ? 0 : slopes[i] * scale;
            total[i] += slopes[i];
        }
    }
}

/* z <- (h - low) / spread of n numbers; range <- low, high, and spread: high - low, at least eps. */
void minmax(const float *h, float *z, float *range, long n, float eps) {
    float lows[LANES], highs[LANES], low = h[0], high = h[0];
    for (int s = 0; s < LANES; s++) lows[s] = highs[s] = h[0];
    long whole = n / LANES * LANES;
    int strange = 0;
    for (long i = 0; i < whole; i += LANES) {
#pragma omp simd
        for (int s = 0; s < LANES; s++) {
            lows[s] = h[i + s] < lows[s] ? h[i + s] : lows[s];
            highs[s] = h[i + s] > highs[s] ? h[i + s] : highs[s];
        }
    }
    for (int s = 0; s < LANES; s++) low = lows[s] < low ? lows[s] : low, high = highs[s] > high ? highs[s] : high;
    for (long i = whole; i < n; i++) low = h[i] < low ? h[i] : low, high = h[i] > high ? h[i] : high;
#pragma omp simd reduction(| : strange)
    for (long i = 0; i < n; i++) strange |= h[i] != h[i];
    if (strange) low = high = NAN; /* what no comparison finds */
    float spread = high - low < eps ? eps : high - low, scale = 1 / spread;
    range[0] = low, range[1] = high, range[2] = spread;
#pragma omp simd
    for (long i = 0; i < n; i++) z[i] = (h[i] - low) * scale;
}

/* d <- the gradient of h in `minmax`; numbers of equal rank share what belongs to an extreme. */
void minmax_slopes(const float *grad, const float *h, const float *z, const float *range, float *d, long n) {
    float low = range[0], high = range[1], scale = 1 / range[2];
    double sum = 0, weighted = 0;
    long lowest = 0, highest = 0;
    for (long start = 0; start < n; start += 1024) { /* short sums are in float, and fast */
        float part = 0, weighted_part = 0;
        int lows = 0, highs = 0;
        long end = start + 1024 < n ? start + 1024 : n;
#pragma omp simd reduction(+ : part, weighted_part, lows, highs)
        for (long i = start; i < end; i++) {
            part += grad[i];
            weighted_part += grad[i] * z[i];
            lows += h[i] == low;
            highs += h[i] == high;
        }
        sum += part, weighted += weighted_part, lowest += lows, highest += highs;
    }
    float of_low = (weighted - sum) * scale / lowest, of_high = -weighted * scale / highest;
#pragma omp simd
    for (long i = 0; i < n; i++)
        d[i] = grad[i] * scale + (h[i] == low ? 1.0f : 0.0f) * of_low + (h[i] == high ? 1.0f : 0.0f) * of_high;
}

enum { BLOCK = 64 };

/* A step of SGD with momentum whose gradient is x^T grad, of x (count, rows) and grad (count, cols), or, without an x,
   grad (rows, cols): speed <- momentum speed + gradient, weight <- weight - rate speed. */
void momentum_step(float *weight, float *speed, const float *x, const float *grad, long count, long rows, long cols,
                   float rate, float momentum) {
    int skips = all_finite(grad, (x ? count : rows) * cols); /* otherwise zero times some slope is not zero */
#pragma omp parallel for schedule(static)
    for (long row = 0; row < rows; row++) {
        float *to = weight + row * cols, *moves = speed + row * cols;
        for (long first = 0; first < cols; first += BLOCK) {
            long width = cols - first < BLOCK ? cols - first : BLOCK;
            float slopes[BLOCK] = {0};
            if (x && width == BLOCK) {
                lanes sum[BLOCK / LANES] = {{0}};
                for (long k = 0; k < count; k++) {
                    float times = x[k * rows + row];
                    if (skips && times == 0) continue; /* most pixels are black */
                    const float *from = grad + k * cols + first;
                    for (int s = 0; s < BLOCK / LANES; s++) sum[s] += times * *(const anywhere *)(from + s * LANES);
                }
                memcpy(slopes, sum, sizeof sum);
            } else if (x) {
                for (long k = 0; k < count; k++)
                    for (long i = 0; i < width; i++) slopes[i] += x[k * rows + row] * grad[k * cols + first + i];
            } else {
                memcpy(slopes, grad + row * cols + first, width * sizeof(float));
            }
#pragma omp simd
            for (long i = 0; i < width; i++) {
                float moved = momentum * moves[first + i] + slopes[i];
                moves[first + i] = moved;
                to[first + i] -= rate * moved;
            }
        }
    }
}

/* ---- small symmetric positive definite systems, in double */

enum { PANEL = 8 };

/* The Cholesky factor of K + ridge I, of K (n, n): L, column after column; above its diagonal are numbers without
   meaning. Returns how many columns are left where the matrix is found not to be positive definite, or not finite. */
long spd_factor(const float *K, double *L, long n, float ridge) {
    for (long row = 0; row < n; row++)
        for (long i = 0; i <= row; i++) L[i * n + row] = K[row * n + i];
    for (long i = 0; i < n; i++) L[i * n + i] += ridge;
    for (long first = 0; first < n; first += PANEL) {
        long last = first + PANEL < n ? first + PANEL : n;
        for (long p = first; p < last; p++) {
            double *column = L + p * n;
            for (long q = first; q < p; q++) {
                const double *before = L + q * n;
                double times = before[p];
#pragma omp simd
                for (long i = p; i < n; i++) column[i] -= times * before[i];
            }
            if (!(column[p] > 0 && column[p] <= DBL_MAX)) return n - p;
            double scale = 1 / sqrt(column[p]);
#pragma omp simd
            for (long i = p; i < n; i++) column[i] *= scale;
        }
        if (last - first < PANEL) break;
        const double *panel = L + first * n;
        for (long j = last; j < n; j++) {
            double *column = L + j * n, times[PANEL];
            for (long q = 0; q < PANEL; q++) times[q] = panel[q * n + j];
#pragma omp simd
            for (long i = j; i < n; i++) {
                double sum = 0;
                for (long q = 0; q < PANEL; q++) sum += times[q] * panel[q * n + i];
                column[i] -= sum;
            }
        }
    }
    return 0;
}

typedef double quad __attribute__((vector_size(32)));
enum { QUADS = 3, SIDES = 4 * QUADS }; /* right-hand sides that are solved together: registers hold as many sums */

/* X <- (L L^T)^-1 B, of B and X (n, columns). */
void spd_solve(const double *L, const float *B, float *X, long n, long columns) {
    quad *x = aligned_alloc(sizeof(quad), n * QUADS * sizeof(quad));
    for (long first = 0; first < columns; first += SIDES) {
        long count = columns - first < SIDES ? columns - first : SIDES;
        for (long i = 0; i < n; i++) {
            double row[SIDES] = {0};
            for (long c = 0; c < count; c++) row[c] = B[i * columns + first + c];
            memcpy(x + i * QUADS, row, sizeof row);
        }
        for (long start = 0; start < n; start += PANEL) {
            long end = start + PANEL < n ? start + PANEL : n;
            for (long i = start; i < n; i++) {
                quad *row = x + i * QUADS, a = row[0], b = row[1], c = row[2];
                for (long j = start; j < (i < end ? i : end); j++) {
                    double times = L[j * n + i];
                    const quad *before = x + j * QUADS;
                    a -= times * before[0], b -= times * before[1], c -= times * before[2];
                }
                double scale = i < end ? 1 / L[i * n + i] : 1;
                row[0] = a * scale, row[1] = b * scale, row[2] = c * scale;
            }
        }
        for (long i = n - 1; i >= 0; i--) {
            const double *column = L + i * n;
            quad *row = x + i * QUADS, a = row[0], b = row[1], c = row[2];
            for (long j = i + 1; j < n; j++) {
                const quad *after = x + j * QUADS;
                a -= column[j] * after[0], b -= column[j] * after[1], c -= column[j] * after[2];
            }
            double scale = 1 / column[i];
            row[0] = a * scale, row[1] = b * scale, row[2] = c * scale;
        }
        for (long i = 0; i < n; i++) {
            double row[SIDES];
            memcpy(row, x + i * QUADS, sizeof row);
            for (long c = 0; c < count; c++) X[i * columns + first + c] = row[c];
        }
    }
    free(x);
}

/* ---- a kernel ridge classifier and the cross-entropy of its answers ---- */

static float *zeros_of(long count) { return calloc(count, sizeof(float)); }

/* loss <- mean cross-entropy of gamma scores + beta; g <- its gradient in the scores; head_slopes[1], [2] <- those in
   gamma and beta. Classes that are not active have a logit of -1e11. */
static void cross_entropy(const float *scores, const int64_t *labels, const uint8_t *active, float gamma, float beta,
                          long count, long classes, float *loss, float *g, float *head_slopes) {
    double total = 0, of_gamma = 0, of_beta = 0;
    for (long i = 0; i < count; i++) {
        const float *row = scores + i * classes;
        float *to = g + i * classes, most = -3e38f, sum = 0;
        for (long c = 0; c < classes; c++) {
            to[c] = active[c] ? gamma * row[c] + beta : -1e11f;
            most = to[c] > most ? to[c] : most;
        }
        total -= to[labels[i]] - most;
        for (long c = 0; c < classes; c++) sum += to[c] = expf(to[c] - most);
        total += log(sum);
        for (long c = 0; c < classes; c++) {
            float slope = active[c] ? (to[c] / sum - (c == labels[i])) / count : 0;
            of_gamma += slope * row[c];
            of_beta += slope;
            to[c] = gamma * slope;
        }
    }
    *loss = total / count;
    head_slopes[1] = of_gamma, head_slopes[2] = of_beta;
}

/* loss <- mean cross-entropy of gamma K(queries, support) (K(support, support) + (|lambda| + floor) I)^-1 targets + beta,
   over the classes that are active; K(a, b) = a.b, or (a.b + 1)^3 if cubic. Its gradients: d_support (points, dim),
   d_queries (queries, dim) and head_slopes: of lambda, gamma, beta. support (points, dim), targets (points, classes),
   labels (queries). Returns 0, or not, where the matrix is found not to be positive definite. */
long ridge_loss(const float *support, const float *queries, const float *targets, const int64_t *labels,
                const uint8_t *active, const float *lambda, const float *gamma, const float *beta, float *loss,
                float *d_support, float *d_queries, float *head_slopes, long points, long count, long dim,
                long classes, float floor, long cubic) {
    matrix Zs = {support, dim, 1}, Zq = {queries, dim, 1};
    float *S = zeros_of(points * points), *Sq = zeros_of(count * points), *scores = zeros_of(count * classes);
    float *w = zeros_of(classes * dim), *G = zeros_of(classes * dim), *of_alpha = zeros_of(points * classes);
    float *alpha = malloc(points * classes * sizeof(float)), *h = malloc(points * classes * sizeof(float));
    float *g = malloc(count * classes * sizeof(float)), *K = S;
    double *L = malloc(points * points * sizeof(double));
    product(Zs, (matrix){support, 1, dim}, S, points, dim, points, 0, 1);
    if (cubic) {
        K = malloc(points * points * sizeof(float));
        for (long i = 0; i < points; i++)
            for (long j = 0; j <= i; j++) {
                float one_more = S[i * points + j] + 1;
                K[i * points + j] = one_more * one_more * one_more;
            }
    }
    long failed = spd_factor(K, L, points, fabsf(*lambda) + floor);
    if (!failed) {
        spd_solve(L, targets, alpha, points, classes);
        matrix A = {alpha, classes, 1}, A_turned = {alpha, 1, classes};
        if (cubic) {
            product(Zq, (matrix){support, 1, dim}, Sq, count, dim, points, 0, 0);
            float *Kq = malloc(count * points * sizeof(float));
            for (long i = 0; i < count * points; i++) Kq[i] = (Sq[i] + 1) * (Sq[i] + 1) * (Sq[i] + 1);
            product((matrix){Kq, points, 1}, A, scores, count, points, classes, 0, 0);
            cross_entropy(scores, labels, active, *gamma, *beta, count, classes, loss, g, head_slopes);
            product((matrix){Kq, 1, points}, (matrix){g, classes, 1}, of_alpha, points, count, classes, 0, 0);
            free(Kq);
        } else { /* all products but K have as many columns as there are classes */
            product(A_turned, Zs, w, classes, points, dim, 0, 0);
            product(Zq, (matrix){w, 1, dim}, scores, count, dim, classes, 0, 0);
            cross_entropy(scores, labels, active, *gamma, *beta, count, classes, loss, g, head_slopes);
            product((matrix){g, 1, classes}, Zq, G, classes, count, dim, 0, 0);
            product(Zs, (matrix){G, 1, dim}, of_alpha, points, dim, classes, 0, 0);
        }
        spd_solve(L, of_alpha, h, points, classes);
        matrix H = {h, classes, 1};
        float of_ridge = 0;
        for (long i = 0; i < points * classes; i++) of_ridge -= h[i] * alpha[i];
        head_slopes[0] = *lambda > 0 ? of_ridge : *lambda < 0 ? -of_ridge : 0;
        memset(d_support, 0, points * dim * sizeof(float));
        memset(d_queries, 0, count * dim * sizeof(float));
        if (cubic) {
            /* the gradients of S and Sq take their places */
            float *of_S = zeros_of(points * points), *of_Sq = zeros_of(count * points);
            product(H, A_turned, of_S, points, classes, points, 0, 0);
            product((matrix){g, classes, 1}, A_turned, of_Sq, count, classes, points, 0, 0);
            for (long i = 0; i < count * points; i++) of_Sq[i] *= 3 * (Sq[i] + 1) * (Sq[i] + 1);
            for (long i = 0; i < points; i++)
                for (long j = 0; j <= i; j++) {
                    float one_more = S[i * points + j] + 1, both = of_S[i * points + j] + of_S[j * points + i];
                    of_S[i * points + j] = of_S[j * points + i] = -3 * both * one_more * one_more;
                }
            product((matrix){of_S, points, 1}, Zs, d_support, points, points, dim, 0, 0);
            product((matrix){of_Sq, 1, points}, Zq, d_support, points, count, dim, 0, 0);
            product((matrix){of_Sq, points, 1}, Zs, d_queries, count, points, dim, 0, 0);
            free(of_S);
            free(of_Sq);
        } else {
            product((matrix){g, classes, 1}, (matrix){w, dim, 1}, d_queries, count, classes, dim, 0, 0);
            for (long i = 0; i < points * classes; i++) h[i] = -h[i];
            product((matrix){h, 1, classes}, Zs, G, classes, points, dim, 0, 0);
            product(A, (matrix){G, dim, 1}, d_support, points, classes, dim, 0, 0);
            product(H, (matrix){w, dim, 1}, d_support, points, classes, dim, 0, 0);
        }
    }
    if (cubic) free(K);
    free(S), free(Sq), free(scores), free(w), free(G), free(of_alpha), free(alpha), free(h), free(g), free(L);
    return failed;
}
