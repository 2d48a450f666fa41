/* A block of a slow-fast network, and its local slow network. */

#include "convolve_plane.h"
#include "gemm.h"
#include "planes.h"

/* A linear layer: y (outs, points) <- w (outs, ins) x (ins, points) + bias (outs). */
static void dense(const float *w, const float *bias, const float *x, float *y, long outs, long ins, long points,
                  float *panels) {
    fill_rows(bias, y, outs, points);
    mix_sample(&(part){w, ins, x, ins}, 1, y, outs, points, 1, panels);
}

/* y (chans, points) <- what a local slow network makes of a context (chans, points) and its waves (layers + 1, hidden,
   points). w: weight and bias of ctx_reduce, of ctx_fc, for every layer of mix and ctx_mix, of out; pos_bias (points). */
void local_kernel(const float *context, const float *waves, const float **w, float *y, long chans, long hidden,
                  long layers, long points) {
    long size = hidden * points;
    float *panels = new_numbers(KC * NC + 3 * size), *c = panels + KC * NC, *h = c + size, *mixed = h + size;
    const float **out = w + 4 * (layers + 1), *pos_bias = out[2];
    dense(w[0], w[1], context, mixed, hidden, chans, points, panels);
    dense(w[2], w[3], mixed, c, hidden, hidden, points, panels);
    for (long i = 0; i < size; i++) c[i] = gelu(c[i]);
    memcpy(h, waves, size * sizeof(float));
    for (long layer = 1; layer <= layers; layer++) {
        const float **own = w + 4 * layer;
        dense(own[0], own[1], h, mixed, hidden, hidden, points, panels);
        for (long row = 0; row < size; row += points) {
            const float *wave = waves + layer * size + row;
            float squares = 0;
#pragma omp simd reduction(+ : squares)
            for (long i = 0; i < points; i++) {
                h[row + i] = wave[i] * mixed[row + i] + pos_bias[i];
                squares += h[row + i] * h[row + i];
            }
            float norm = sqrtf(squares), least_norm = norm < 1e-12f ? 1e-12f : norm;
            for (long i = 0; i < points; i++) h[row + i] += 0.1f * (h[row + i] / least_norm); /* infinity: not a number */
        }
        dense(own[2], own[3], c, mixed, hidden, hidden, points, panels);
        for (long i = 0; i < size; i++) h[i] *= mixed[i];
    }
    dense(out[0], out[1], h, y, chans, hidden, points, panels);
    free(panels);
}

/* y <- gelu of the standardised (key + a) (query + b), plus bias, of a plane; y may be key. Returns 1 if its variance is not
   finite. */
INLINE int plane_gate(const float *key, const float *query, float a, float b, const float *bias, float *y, long points,
                      float eps) {
#pragma omp simd
    for (long i = 0; i < points; i++) y[i] = (key[i] + a) * (query[i] + b);
    return plane_standardise(y, NULL, bias, y, points, eps);
}

/* A recursive gated unit without its last layer: weights (chans, chans), biases (chans), pos (points). */
typedef struct { const float *key, *key_bias, *value, *value_bias, *query, *query_bias, *pos; } gated_unit;

typedef struct {
    const float *kernel; /* (chans, points) */
    gated_unit slow, fast;
    const float *slow_y, *fast_y, *along, *across, *bias; /* along (chans), across (points), bias (rows) or NULL */
} global_weights;

/* Its second factor as one linear layer, some rows: joint <- query value and, behind (chans, chans), the bias. */
static void join_rows(const gated_unit *unit, float *joint, long chans, long from, long to, float *panels) {
    part values = {unit->query + from * chans, chans, unit->value, chans};
    mix_sample(&values, 1, joint + from * chans, to - from, chans, 0, panels);
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
    int strange = 0;
    for (long c = 0; c < chans; c++) {
        long at = c * points;
        strange += plane_gate(key + at, query + at, unit->key_bias[c], bias[c], unit->pos, key + at, points, 1e-5f);
    }
    return strange;
}

static int standardise_sample(float *x, long chans, long points) {
    int strange = 0;
    for (long c = 0; c < chans; c++)
        strange += plane_standardise(x + c * points, NULL, NULL, x + c * points, points, 1e-5f);
    return strange;
}

/* y <- what the bottleneck makes of all but the local branches.
   x, hci and mix (batch, chans, side, side), y (batch, rows, side, side); columns of the bottleneck, (rows, their
   channels), and `down` from row to row, for fast, hi, the three products, silu, and `earlier` outputs, which are
   (batch, widths, side, side). Returns how many planes had a variance that is not finite on the way. */
long global_paths(const global_weights *w, const float *x, const float *hci, const float *mix, const float **before,
                  const float **columns, const long *down, const long *widths, float *y, long batch, long chans,
                  long rows, long side, long earlier) {
    enum { MAPS = 6, PARTS = MAPS + 2 };
    long points = side * side, size = chans * points;
    float *slow_joint = new_numbers(2 * chans * (chans + 1)), *fast_joint = slow_joint + chans * (chans + 1);
    long strange = 0;
#pragma omp parallel reduction(+ : strange)
    {
        float *panels = new_numbers(KC * NC), *memory = new_numbers(MAPS * size + chans + points);
#pragma omp for schedule(static)
        for (long c = 0; c < chans; c += MR_TWICE) {
            join_rows(&w->slow, slow_joint, chans, c, least(c + MR_TWICE, chans), panels);
            join_rows(&w->fast, fast_joint, chans, c, least(c + MR_TWICE, chans), panels);
        }
        float *fast = memory, *hi = fast + size, *found[4] = {hi + size, hi + 2 * size, hi + 3 * size, hi + 4 * size};
        float *plane = memory + MAPS * size, *pixel = plane + chans, *context = found[0];
        lanes *panel = zeros(side * COL_TILE);
#pragma omp for schedule(dynamic)
        for (long b = 0; b < batch; b++) {
            const float *own = x + b * size, *of_hci = hci + b * size, *of_mix = mix + b * size;
            float *out = y + b * rows * points;
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
        float *panels = new_numbers(KC * NC), *map = new_numbers(size);
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
void add_local_outputs(float **z, const float **mean, const float **scale, const float **bias, const float **w,
                   const long *down, float *y, long branches, long batch, long chans, long rows, long points) {
    long stretches = (points + NC - 1) / NC, size = chans * points;
#pragma omp parallel
    {
        float *panels = new_numbers(KC * NC);
#pragma omp for schedule(dynamic)
        for (long task = 0; task < batch * stretches; task++) {
            long b = task / stretches, from = task % stretches * NC, to = least(from + NC, points);
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
