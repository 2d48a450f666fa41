/* shortcut + W2 GRN(GELU(W1 (gate x) + b1)) + b2 with gate = sigmoid(U relu(D mean(x) + d) + u); see
   zoo/ops/feed_forward.py. */

#include "activations.h"
#include "gemm.h"

enum { MC = 17 * MR }; /* maximum number of pixels at a time: L2 cache holds KC floats of each */

/* x, shortcut and y (batch, pixels, chans), D (few, chans), d (few), U (chans, few), u (chans), b1 and gamma (wide),
   b2 (chans), and the panels of W1 (wide, chans) and W2 (chans, wide). */
typedef struct {
    const float *x, *D, *d, *U, *u, *b1, *gamma, *b2, *shortcut;
    const lanes *first, *second;
    float *y;
    long pixels, chans, few, wide;
} network;

/* gate (chans) <- channel attention of a sample; squeezed (chans + few) is working memory. */
static void se_gate(const network *n, long sample, float *gate, float *squeezed) {
    const float *x = n->x + sample * n->pixels * n->chans;
    float *mean = squeezed, *hidden = squeezed + n->chans;
    memset(mean, 0, n->chans * sizeof(float));
    for (long first = 0; first < n->pixels; first += MC) { /* sum in parts, for accuracy */
        long last = least(first + MC, n->pixels);
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

static long panels_of(long outputs) { return (outputs + NR - 1) / NR; }

static lanes *new_panels(long outputs, long terms) {
    return aligned_alloc(sizeof(lanes), panels_of(outputs) * terms * NR * sizeof(float));
}

typedef float eight __attribute__((vector_size(32), aligned(4)));

#if defined(__clang__) || __GNUC__ >= 12
#define EIGHT(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t places __attribute__((vector_size(32)));
#define EIGHT(a, b, ...) __builtin_shuffle(a, b, (places){__VA_ARGS__})
#endif

/* to (8, 8) <- transpose of from (8, 8), with row strides. */
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

/* panels <- w (outputs, terms), packed in panels of NR outputs with all terms, zero-padded. */
static void put_panels(const float *w, lanes *panels, long outputs, long terms) {
#pragma omp for schedule(static)
    for (long j = 0; j < outputs; j += NR) {
        float *panel = (float *)panels + j * terms;
        long width = least(outputs - j, NR), whole = width < NR ? 0 : terms / 8 * 8;
        if (width < NR) memset(panel, 0, terms * NR * sizeof(float));
        for (long l = 0; l < whole; l += 8)
            for (long c = 0; c < NR; c += 8)
                transpose(w + (j + c) * terms + l, terms, panel + l * NR + c, NR);
        for (long l = whole; l < terms; l++)
            for (long c = 0; c < width; c++) panel[l * NR + c] = w[(j + c) * terms + l];
    }
}

/* part (rows, deep) <- columns of x times scale. */
static void put_scaled(const float *x, long step, const float *scale, float *part, long rows, long deep) {
    for (long r = 0; r < rows; r++) {
#pragma omp simd
        for (long l = 0; l < deep; l++) part[r * deep + l] = x[r * step + l] * scale[l];
    }
}

/* h <- (h +) a b for some rows and the columns of a panel; for the last part, bias, gelu and energies. */
INLINE void hidden_rows(const float *a, const lanes *b, long deep, float *h, long step, const float *bias, float *energy,
                        long width, int more, int last, const int mr) {
    lanes sum[MR][NR_VECTORS];
    sum_rows((matrix){a, deep, 1}, b, deep, sum, mr);
    for (int r = 0; r < mr; r++, h += step) {
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

/* Hidden layer of some pixels, and energies of its channels over them. */
static void ffn_up(const network *n, long sample, const float *gate, long from, long to, float *hidden, float *energy) {
    float part[MC * KC];
    long rows = to - from, chans = n->chans, wide = n->wide;
    const float *x = n->x + (sample * n->pixels + from) * chans;
    memset(energy, 0, wide * sizeof(float));
    for (long l = 0; l < chans; l += KC) {
        long deep = least(chans - l, KC);
        put_scaled(x + l, chans, gate + l, part, rows, deep);
        for (long j = 0; j < wide; j += NR) {
            const lanes *panel = n->first + (j * chans + l * NR) / LANES;
            for (long i = 0; i < rows; i += MR) {
                float *h = hidden + (from + i) * wide + j;
                long width = least(wide - j, NR);
                if (width == NR) {
                    WITH_MR(rows - i, hidden_rows(part + i * deep, panel, deep, h, wide, n->b1 + j, energy + j, NR,
                                                    l > 0, l + deep == chans, mr))
                } else {
                    WITH_MR(rows - i, hidden_rows(part + i * deep, panel, deep, h, wide, n->b1 + j, energy + j, width,
                                                    l > 0, l + deep == chans, mr))
                }
            }
        }
    }
}

/* energy (parts, wide): replace its first row by the scales of GRN. */
static void grn_scale(const network *n, float *energy, long parts) {
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
                        long step, long width, int more, const int mr) {
    lanes sum[MR][NR_VECTORS];
    sum_rows((matrix){a, deep, 1}, b, deep, sum, mr);
    for (int r = 0; r < mr; r++, y += step, shortcut += step) {
        const float *sums = (const float *)sum[r];
        if (more)
            for (long c = 0; c < width; c++) y[c] += sums[c];
        else
            for (long c = 0; c < width; c++) y[c] = sums[c] + shortcut[c] + bias[c];
    }
}

/* Outputs of some pixels. */
static void ffn_down(const network *n, long sample, long from, long to, const float *hidden, const float *scale) {
    float part[MC * KC];
    long rows = to - from, chans = n->chans, wide = n->wide, at = (sample * n->pixels + from) * chans;
    for (long l = 0; l < wide; l += KC) {
        long deep = least(wide - l, KC);
        put_scaled(hidden + from * wide + l, wide, scale + l, part, rows, deep);
        for (long j = 0; j < chans; j += NR) {
            const lanes *panel = n->second + (j * wide + l * NR) / LANES;
            for (long i = 0; i < rows; i += MR) {
                long to = at + i * chans + j, width = least(chans - j, NR);
                if (width == NR) {
                    WITH_MR(rows - i, output_rows(part + i * deep, panel, deep, n->y + to, n->shortcut + to,
                                                    n->b2 + j, chans, NR, l > 0, mr))
                } else {
                    WITH_MR(rows - i, output_rows(part + i * deep, panel, deep, n->y + to, n->shortcut + to,
                                                    n->b2 + j, chans, width, l > 0, mr))
                }
            }
        }
    }
}

/* hidden: (pixels, wide) for each sample in progress. */
void feed_forward(const float *x, const float *D, const float *d, const float *U, const float *u, const float *w1,
                  const float *b1, const float *gamma, const float *w2, const float *b2, const float *shortcut, float *y,
                  float *hidden, long batch, long pixels, long chans, long few, long wide, long threads) {
    long parts = (pixels + MC - 1) / MC, size = ((pixels + parts - 1) / parts + MR - 1) / MR * MR;
    long own = parts * wide + 2 * chans + few; /* working memory per thread, floats */
    lanes *first = new_panels(wide, chans), *second = new_panels(chans, wide);
    float *memory = malloc(threads * own * sizeof(float));
    network n = {x, D, d, U, u, b1, gamma, b2, shortcut, first, second, y, pixels, chans, few, wide};
#define PART least(p *size, pixels), least((p + 1) * size, pixels)
#pragma omp parallel num_threads(threads)
    {
        long thread = batch < threads ? 0 : omp_get_thread_num(); /* with enough samples, one per thread */
        float *h = hidden + thread * pixels * wide, *energy = memory + thread * own, *gate = energy + parts * wide;
        put_panels(w1, first, wide, chans);
        put_panels(w2, second, chans, wide);
        if (batch >= threads) {
#pragma omp for schedule(dynamic)
            for (long sample = 0; sample < batch; sample++) {
                se_gate(&n, sample, gate, gate + chans);
                for (long p = 0; p < parts; p++) ffn_up(&n, sample, gate, PART, h, energy + p * wide);
                grn_scale(&n, energy, parts);
                for (long p = 0; p < parts; p++) ffn_down(&n, sample, PART, h, energy);
            }
        } else {
            for (long sample = 0; sample < batch; sample++) {
#pragma omp single
                se_gate(&n, sample, gate, gate + chans);
#pragma omp for schedule(dynamic)
                for (long p = 0; p < parts; p++) ffn_up(&n, sample, gate, PART, h, energy + p * wide);
#pragma omp single
                grn_scale(&n, energy, parts);
#pragma omp for schedule(dynamic)
                for (long p = 0; p < parts; p++) ffn_down(&n, sample, PART, h, energy);
            }
        }
    }
#undef PART
    free(first);
    free(second);
    free(memory);
}
