/* Steps of a kernel ridge learner: perceptrons with dropout, small systems in double, the loss. */

#include "gemm.h"

static inline uint32_t hash_u32(uint32_t x) { /* every bit of x changes half of the bits of the result */
    x ^= x >> 16;
    x *= 0x85ebca6bu;
    x ^= x >> 13;
    x *= 0xc2b2ae35u;
    return x ^ x >> 16;
}

/* h <- scale times what ReLU and dropout leave of h + bias: number i is dropped, times 0, where hash_u32(seed + i) is
   below the bar. */
void relu_dropout(float *h, const float *bias, long rows, long cols, float scale, long bar, long seed) {
    for (long row = 0; row < rows; row++) {
        float *values = h + row * cols;
        uint32_t first = (uint32_t)seed + (uint32_t)(row * cols);
#pragma omp simd
        for (long i = 0; i < cols; i++) {
            float value = values[i] + bias[i];
            float share = hash_u32(first + (uint32_t)i) >= (uint32_t)bar ? scale : 0;
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
