/* What decoding on a CPU does with one new token a row of a text (native.py says when).
 *
 * Compiled twice: a W is a float, or with BFLOAT16 the bits of a bfloat16. Sums are of floats. All
 * matrices are [out, in] as torch stores them, whose rows are read one after the other: with few
 * rows of states a step is the reading of weights, and memory is fastest in order. A team of
 * threads divides what is to be written and meets after each stage; it stays together for a step.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define PAIR (2 * LANES) /* numbers of a row at a time: `in` is a multiple */
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

static inline Lanes load(const float *from) {
    Lanes x;
    memcpy(&x, from, sizeof x);
    return x;
}

static inline void store(float *to, Lanes x) { memcpy(to, &x, sizeof x); }

static inline Lanes all(float x) { return x - (Lanes){0}; }

#ifdef BFLOAT16
typedef uint16_t W;

static inline float widened(W w) {
    uint32_t bits = (uint32_t)w << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline W rounded(float x) { /* to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0; /* NaN */
    return (W)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* 32 weights: those of even places and those of odd ones, which takes no shuffling. */
static inline void weights(Lanes to[2], const W *from) {
    Bits bits;
    memcpy(&bits, from, sizeof bits);
    to[0] = (Lanes)(bits << 16);
    to[1] = (Lanes)(bits & 0xffff0000u);
}

/* States in the order of `weights`. */
static inline void ordered(float *to, const float *x, int64_t count) {
    for (int64_t i = 0; i < count; i += PAIR)
        for (int k = 0; k < LANES; k++) {
            to[i + k] = x[i + 2 * k];
            to[i + LANES + k] = x[i + 2 * k + 1];
        }
}
#else
typedef float W;

static inline float widened(W w) { return w; }

static inline W rounded(float x) { return x; }

static inline void weights(Lanes to[2], const W *from) {
    to[0] = load(from);
    to[1] = load(from + LANES);
}

static inline void ordered(float *to, const float *x, int64_t count) {
    memcpy(to, x, count * sizeof *to);
}
#endif

static inline float sum(Lanes x) {
    float half[LANES / 2], quarter[LANES / 4];
    for (int i = 0; i < LANES / 2; i++) half[i] = x[i] + x[i + LANES / 2];
    for (int i = 0; i < LANES / 4; i++) quarter[i] = half[i] + half[i + LANES / 4];
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

/* 2^n of the nearest n to x / ln 2, times a polynomial of what is left (Cephes' expf). */
static inline Lanes exponential(Lanes x) {
    const Lanes low = all(-87.3f), high = all(88.0f);
    Ints below = x < low, above = x > high;
    x = (Lanes)((below & (Ints)low) | (above & (Ints)high) | (~(below | above) & (Ints)x));
    Lanes n = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23, which rounds */
    n -= 12582912.0f;
    Lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Lanes p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (Lanes)((__builtin_convertvector(n, Ints) + 127) << 23);
}

/* GELU by tanh: x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3))). */
static void gelus(float *x, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        Lanes v = load(x + i);
        store(x + i, v / (1.0f + exponential(-1.5957691216f * (v + 0.044715f * v * v * v))));
    }
    for (; i < count; i++) x[i] /= 1 + expf(-1.5957691216f * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
}

static void layer_norm(float *to, const float *x, const W *weight, const W *bias, int64_t count,
                       float eps) {
    Lanes total = {0};
    for (int64_t i = 0; i < count; i += LANES) total += load(x + i);
    float mean = sum(total) / count;
    total = all(0);
    for (int64_t i = 0; i < count; i += LANES) {
        Lanes d = load(x + i) - mean;
        total += d * d;
    }
    float scale = 1 / sqrtf(sum(total) / count + eps);
    for (int64_t i = 0; i < count; i++)
        to[i] = (x[i] - mean) * scale * widened(weight[i]) + widened(bias[i]);
}

/* ---- products ---- */

/* A row of weights times one row of states, by four sums, which hide how long an addition takes. */
static void dots_1(float *to, const float *x, const W *w, int64_t in) {
    Lanes a = {0}, b = {0}, c = {0}, d = {0}, v[2];
    int64_t i = 0;
    for (; i + 2 * PAIR <= in; i += 2 * PAIR) {
        weights(v, w + i);
        a += v[0] * load(x + i);
        b += v[1] * load(x + i + LANES);
        weights(v, w + i + PAIR);
        c += v[0] * load(x + i + PAIR);
        d += v[1] * load(x + i + PAIR + LANES);
    }
    for (; i < in; i += PAIR) {
        weights(v, w + i);
        a += v[0] * load(x + i);
        b += v[1] * load(x + i + LANES);
    }
    *to = sum((a + b) + (c + d));
}

/* Of floats, whatever a W is; `count` is a multiple of LANES. */
static inline float dot(const float *x, const float *y, int64_t count) {
    Lanes a = {0}, b = {0}, c = {0}, d = {0};
    int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES) {
        a += load(x + i) * load(y + i);
        b += load(x + i + LANES) * load(y + i + LANES);
        c += load(x + i + 2 * LANES) * load(y + i + 2 * LANES);
        d += load(x + i + 3 * LANES) * load(y + i + 3 * LANES);
    }
    for (; i < count; i += LANES) a += load(x + i) * load(y + i);
    return sum((a + b) + (c + d));
}

/* `dots_1` of four rows (sums named one by one: an array of them would lie in memory). */
static void dots_4(float *to, const float *x, const W *w, int64_t in, int64_t stride) {
    const float *y = x + in, *z = y + in, *u = z + in;
    Lanes a = {0}, b = {0}, c = {0}, d = {0}, e = {0}, f = {0}, g = {0}, h = {0}, v[2];
    for (int64_t i = 0; i < in; i += PAIR) {
        weights(v, w + i);
        a += v[0] * load(x + i);
        b += v[1] * load(x + i + LANES);
        c += v[0] * load(y + i);
        d += v[1] * load(y + i + LANES);
        e += v[0] * load(z + i);
        f += v[1] * load(z + i + LANES);
        g += v[0] * load(u + i);
        h += v[1] * load(u + i + LANES);
    }
    to[0] = sum(a + b);
    to[stride] = sum(c + d);
    to[2 * stride] = sum(e + f);
    to[3 * stride] = sum(g + h);
}

static void dots_2(float *to, const float *x, const W *w, int64_t in, int64_t stride) {
    const float *y = x + in;
    Lanes a = {0}, b = {0}, c = {0}, d = {0}, v[2];
    for (int64_t i = 0; i < in; i += PAIR) {
        weights(v, w + i);
        a += v[0] * load(x + i);
        b += v[1] * load(x + i + LANES);
        c += v[0] * load(y + i);
        d += v[1] * load(y + i + LANES);
    }
    to[0] = sum(a + b);
    to[stride] = sum(c + d);
}

/* to[rows, out] = x[rows, in] weight^T (+ bias), of the outputs [from, until); x is ordered. */
static void product(float *to, const float *x, const W *weight, const W *bias, int64_t in,
                    int64_t out, int64_t rows, int64_t from, int64_t until) {
    for (int64_t o = from; o < until; o++) {
        const W *w = weight + o * in;
        float *y = to + o;
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4) dots_4(y + r * out, x + r * in, w, in, out);
        for (; r + 2 <= rows; r += 2) dots_2(y + r * out, x + r * in, w, in, out);
        if (r < rows) dots_1(y + r * out, x + r * in, w, in);
        if (bias)
            for (r = 0; r < rows; r++) y[r * out] += widened(bias[o]);
    }
}

/* A thread's part of `count` things, in whole units. */
typedef struct {
    int64_t from, until;
} Part;

static inline Part part(int64_t count, int64_t unit, int64_t me, int64_t threads) {
    int64_t units = (count + unit - 1) / unit;
    int64_t from = units * me / threads * unit, until = units * (me + 1) / threads * unit;
    return (Part){from, until < count ? until : count};
}

/* ---- attention ---- */

/* to = softmax(query . keys / sqrt(dim)) values, over the first `seen` of them. */
static void look(float *to, const float *query, const float *keys, const float *values,
                 float *scores, int64_t seen, int64_t dim) {
    float scale = 1 / sqrtf(dim), most = -INFINITY, total = 0;
    for (int64_t s = 0; s < seen; s++) {
        Lanes dot = {0};
        for (int64_t i = 0; i < dim; i += LANES) dot += load(query + i) * load(keys + s * dim + i);
        scores[s] = sum(dot) * scale;
        most = scores[s] > most ? scores[s] : most;
    }
    for (int64_t s = seen; s % LANES; s++) scores[s] = most;
    for (int64_t s = 0; s < seen; s += LANES)
        store(scores + s, exponential(load(scores + s) - most));
    for (int64_t s = 0; s < seen; s++) total += scores[s];
    for (int64_t i = 0; i < dim; i += LANES) {
        Lanes found = {0};
        for (int64_t s = 0; s < seen; s++) found += scores[s] * load(values + s * dim + i);
        store(to + i, found / total);
    }
}

/* A layer's cache, [2, rows, heads, slots, dim]: keys, then values. */
typedef struct {
    float *kv;
    int64_t rows, heads, slots, dim;
} Cache;

/* One head of one text: its new key and value are stored where the text ends, then it looks. A row
 * that idles may claim to be longer than there is room for; what it leaves in the last slot nobody
 * sees. */
static void attend_head(float *to, const float *query, const float *key, const float *value,
                        Cache cache, int64_t place, int64_t length, float *scores) {
    int64_t size = cache.slots * cache.dim, slot = length < cache.slots ? length : cache.slots - 1;
    float *keys = cache.kv + place * size, *values = keys + cache.rows * cache.heads * size;
    memcpy(keys + slot * cache.dim, key, cache.dim * sizeof *keys);
    memcpy(values + slot * cache.dim, value, cache.dim * sizeof *values);
    look(to, query, keys, values, scores, slot + 1, cache.dim);
}

/* ---- what native.py calls; `work` is floats for a thread to write in, as many as it says ---- */

/* How many tokens are none. */
static int64_t unknown(const int64_t *tokens, int64_t count, int64_t vocab) {
    int64_t found = 0;
    for (int64_t i = 0; i < count; i++) found += tokens[i] < 0 || tokens[i] >= vocab;
    return found;
}

static inline void widen(float *to, const W *from, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = widened(from[i]);
}

/* found[rows, heads * dim] of qkv[rows, 3, heads, dim]. work: threads * (4 dim + slots + LANES). */
int64_t attend(W *found, const W *qkv, float *kv, const int64_t *lengths, int64_t rows,
               int64_t heads, int64_t slots, int64_t dim, int64_t num_threads, float *work) {
    Cache cache = {kv, rows, heads, slots, dim};
#pragma omp parallel num_threads(num_threads)
    {
        int64_t me = omp_get_thread_num();
        Part mine = part(rows * heads, 1, me, omp_get_num_threads());
        float *three = work + me * (4 * dim + slots + LANES), *to = three + 3 * dim;
        for (int64_t place = mine.from; place < mine.until; place++) {
            const W *from = qkv + (place / heads * 3 * heads + place % heads) * dim;
            for (int k = 0; k < 3; k++) widen(three + k * dim, from + k * heads * dim, dim);
            attend_head(to, three, three + dim, three + 2 * dim, cache, place,
                        lengths[place / heads], to + dim);
            for (int64_t i = 0; i < dim; i++) found[place * dim + i] = rounded(to[i]);
        }
    }
    return 0;
}

/* found[rows, out] = x[rows, in] weight^T + bias: then through a GELU, or added to `onto`; neither
 * bias nor onto need be there. work: rows * (out + 2 in). */
int64_t linear(W *found, const W *x, const W *weight, const W *bias, const W *onto, int64_t through,
               int64_t in, int64_t out, int64_t rows, int64_t num_threads, float *work) {
    float *to = work, *states = to + rows * out, *widened_x = states + rows * in;
    widen(widened_x, x, rows * in);
    ordered(states, widened_x, rows * in);
#pragma omp parallel num_threads(num_threads)
    {
        Part mine = part(out, LANES, omp_get_thread_num(), omp_get_num_threads());
        product(to, states, weight, bias, in, out, rows, mine.from, mine.until);
        for (int64_t r = 0; r < rows; r++) {
            float *y = to + r * out;
            if (through) gelus(y + mine.from, mine.until - mine.from);
            for (int64_t o = mine.from; o < mine.until; o++)
                found[r * out + o] = rounded(onto ? y[o] + widened(onto[r * out + o]) : y[o]);
        }
    }
    return 0;
}

#ifndef BFLOAT16
/* found[rows, picks] = x[row] . (weight[tokens[row, pick]] - mean) + plus[row], of mean and plus what
 * is there: no row of weights is copied. The number of tokens that are none; if there are any nothing
 * is done. work: rows. */
int64_t gathered(float *found, const float *x, const float *weight, const int64_t *tokens,
                 const float *mean, const float *plus, int64_t vocab, int64_t in, int64_t rows,
                 int64_t picks, int64_t num_threads, float *work) {
    int64_t missing = unknown(tokens, rows * picks, vocab);
    if (missing) return missing;
    for (int64_t r = 0; r < rows; r++) {
        work[r] = plus ? plus[r] : 0;
        if (mean) work[r] -= dot(x + r * in, mean, in);
    }
#pragma omp parallel for num_threads(num_threads)
    for (int64_t i = 0; i < rows * picks; i++)
        found[i] = dot(x + i / picks * in, weight + tokens[i] * in, in) + work[i / picks];
    return 0;
}

/* to = exp(logits - most), exactly 0 where a logit is -inf; their sum. */
static double weigh(float *to, const float *logits, int64_t count, float most) {
    double total = 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        Lanes x = load(logits + i);
        store(to + i, (Lanes)((x > all(-INFINITY)) & (Ints)exponential(x - most)));
    }
    for (; i < count; i++) to[i] = logits[i] > -INFINITY ? expf(logits[i] - most) : 0;
    for (i = 0; i < count; i++) total += to[i];
    return total;
}

static float greatest(const float *x, int64_t count) {
    Lanes top = all(-INFINITY);
    float most = -INFINITY;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        Lanes v = load(x + i);
        Ints more = v > top;
        top = (Lanes)((more & (Ints)v) | (~more & (Ints)top));
    }
    for (int k = 0; k < LANES; k++) most = top[k] > most ? top[k] : most;
    for (; i < count; i++) most = x[i] > most ? x[i] : most;
    return most;
}

/* place[rows]: where the sum of exp(logits), from the left, first exceeds `level` (in [0, 1)) of the
 * whole. Rounding may leave none above: then it is the last that adds something. work: rows * 2 *
 * (count / BLOCK + 1). */
#define BLOCK 256
int64_t sample(int64_t *place, const float *logits, const double *level, int64_t rows,
               int64_t count, int64_t num_threads, float *work) {
    int64_t blocks = count / BLOCK + 1;
#pragma omp parallel for num_threads(num_threads) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        const float *x = logits + row * count;
        double *sums = (double *)work + row * blocks, total = 0, before = 0;
        float p[BLOCK], most = greatest(x, count);
        for (int64_t b = 0; b < blocks; b++) {
            int64_t left = count - b * BLOCK;
            total += sums[b] = weigh(p, x + b * BLOCK, left < BLOCK ? left : BLOCK, most);
        }
        double wanted = level[row] * total;
        int64_t block = 0, last = 0;
        for (; block < blocks && !(before + sums[block] > wanted); block++) {
            before += sums[block];
            if (sums[block] > 0) last = block;
        }
        if (block == blocks) {
            block = last;
            wanted = INFINITY;
        }
        int64_t first = block * BLOCK, left = count - first, i = 0;
        left = left < BLOCK ? left : BLOCK;
        weigh(p, x + first, left, most);
        for (last = 0; i < left && !(before + p[i] > wanted); i++) {
            before += p[i];
            if (p[i] > 0) last = i;
        }
        place[row] = first + (i < left ? i : last);
    }
    return 0;
}

/* KL(pi_b || pi_0) and the variance of values under pi_b, for pi_b ~ p exp(b v) and v <= 0. */
static double divergence(double b, const double *p, const double *v, int64_t count,
                         double *variance) {
    double z = 0, first = 0, second = 0;
    for (int64_t i = 0; i < count; i++) {
        double weight = p[i] * exp(b * v[i]);
        z += weight;
        first += weight * v[i];
        second += weight * v[i] * v[i];
    }
    double mean = first / z, kl = b * mean - log(z), var = second / z - mean * mean;
    *variance = var < 0 ? 0 : var;
    return kl < 0 ? 0 : kl;
}

/* budget.py's solve_beta, a row after the other. work: threads * 4 candidates floats. */
int64_t spend(float *beta, float *spent, const float *logprob, const float *q, double budget,
              double beta_max, double close, int64_t rows, int64_t count, int64_t steps,
              int64_t num_threads, float *work) {
#pragma omp parallel for num_threads(num_threads) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        double *p = (double *)work + omp_get_thread_num() * 2 * count, *v = p + count;
        const float *l = logprob + row * count, *values = q + row * count;
        double most = -INFINITY, top = -INFINITY, total = 0, mean = 0, second = 0, least = 0;
        for (int64_t i = 0; i < count; i++) most = l[i] > most ? l[i] : most;
        for (int64_t i = 0; i < count; i++) total += p[i] = exp(l[i] - most);
        for (int64_t i = 0; i < count; i++) {
            p[i] /= total;
            if (p[i] > 0 && !(values[i] <= top)) top = values[i];
        }
        for (int64_t i = 0; i < count; i++) {
            v[i] = p[i] > 0 ? values[i] - top : 0;
            least = v[i] < least ? v[i] : least;
            mean += p[i] * v[i];
            second += p[i] * v[i] * v[i];
        }
        double variance = second - mean * mean, missing = INFINITY, found = 0;
        double low = sqrt(8 * budget) / -least, high = nextafter(beta_max, INFINITY);
        low = low < beta_max ? low : beta_max;
        double guess = sqrt(2 * budget / (variance > 0 ? variance : 0));
        guess = guess < low ? low : guess > beta_max ? beta_max : guess;
        for (int64_t step = 0; step < steps; step++) {
            found = divergence(guess, p, v, count, &variance);
            double before = missing;
            missing = fabs(found - budget);
            int below = found <= budget;
            if (!(missing > close * budget) || (below && guess >= beta_max)) break;
            if (below) low = guess;
            else high = guess;
            if (!(high > low * (1 + 1e-12))) break; /* as close as its digits allow */
            double root = sqrt(found), next;
            next = guess - 2 * root * (root - sqrt(budget)) / (guess * variance);
            next = next < beta_max ? next : beta_max;
            int good = next > low && next < high && missing <= before / 2;
            good |= next >= beta_max && high > beta_max; /* nobody has been there */
            guess = good ? next : sqrt(low * high);
        }
        beta[row] = guess;
        spent[row] = found;
    }
    return 0;
}
#endif

typedef struct {
    const W *norm_1, *norm_1_bias, *norm_2, *norm_2_bias;
    const W *qkv, *qkv_bias, *out, *out_bias, *up, *up_bias, *down, *down_bias;
    float *kv;
} Layer;

typedef struct {
    int64_t layers, vocab, seq_len, embed, hidden, heads;
    float eps;
    const W *tokens, *positions, *norm, *norm_bias;
} Model;

/* found[rows, embed]: the hidden states of tokens[rows], GPT.hidden; the number of tokens that are
 * none, if there are any nothing is done. work: rows * (5 embed + hidden) + threads * (rows *
 * max(embed, hidden) + embed + slots + LANES). */
int64_t step(W *found, const Model *model, const Layer *layers, const int64_t *tokens,
             const int64_t *lengths, int64_t rows, int64_t slots, int64_t num_threads, float *work) {
    int64_t E = model->embed, H = model->hidden, heads = model->heads, dim = E / heads;
    int64_t wide = H > E ? H : E, missing = unknown(tokens, rows, model->vocab);
    if (missing) return missing;
    float *x = work, *qkv = x + rows * E, *attended = qkv + rows * 3 * E;
    float *hidden = attended + rows * E, *own = hidden + rows * H;
#pragma omp parallel num_threads(num_threads)
    {
        int64_t me = omp_get_thread_num(), threads = omp_get_num_threads();
        float *states = own + me * (rows * wide + E + slots + LANES);
        float *normed = states + rows * wide, *scores = normed + E;
        Part texts = part(rows, 1, me, threads), places = part(rows * heads, 1, me, threads);
        Part of_qkv = part(3 * E, LANES, me, threads), of_embed = part(E, LANES, me, threads);
        Part of_hidden = part(H, LANES, me, threads);
        for (int64_t r = texts.from; r < texts.until; r++) {
            int64_t at = lengths[r] < model->seq_len ? lengths[r] : model->seq_len - 1;
            const W *token = model->tokens + tokens[r] * E, *position = model->positions + at * E;
            for (int64_t i = 0; i < E; i++) x[r * E + i] = widened(token[i]) + widened(position[i]);
        }
#pragma omp barrier
        for (int64_t l = 0; l < model->layers; l++) {
            const Layer *layer = layers + l;
            Cache cache = {layer->kv, rows, heads, slots, dim};
            for (int64_t r = 0; r < rows; r++) { /* every thread all of it: sooner than a barrier */
                layer_norm(normed, x + r * E, layer->norm_1, layer->norm_1_bias, E, model->eps);
                ordered(states + r * E, normed, E);
            }
            product(qkv, states, layer->qkv, layer->qkv_bias, E, 3 * E, rows, of_qkv.from,
                    of_qkv.until);
#pragma omp barrier
            for (int64_t place = places.from; place < places.until; place++) {
                int64_t row = place / heads;
                const float *q = qkv + (row * 3 * heads + place % heads) * dim;
                attend_head(attended + place * dim, q, q + E, q + 2 * E, cache, place, lengths[row],
                            scores);
            }
#pragma omp barrier
            ordered(states, attended, rows * E);
            product(qkv, states, layer->out, layer->out_bias, E, E, rows, of_embed.from,
                    of_embed.until);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t o = of_embed.from; o < of_embed.until; o++)
                    x[r * E + o] += qkv[r * E + o];
#pragma omp barrier
            for (int64_t r = 0; r < rows; r++) {
                layer_norm(normed, x + r * E, layer->norm_2, layer->norm_2_bias, E, model->eps);
                ordered(states + r * E, normed, E);
            }
            product(hidden, states, layer->up, layer->up_bias, E, H, rows, of_hidden.from,
                    of_hidden.until);
            for (int64_t r = 0; r < rows; r++)
                gelus(hidden + r * H + of_hidden.from, of_hidden.until - of_hidden.from);
#pragma omp barrier
            ordered(states, hidden, rows * H);
            product(qkv, states, layer->down, layer->down_bias, H, E, rows, of_embed.from,
                    of_embed.until);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t o = of_embed.from; o < of_embed.until; o++)
                    x[r * E + o] += qkv[r * E + o];
#pragma omp barrier
        }
        for (int64_t r = texts.from; r < texts.until; r++) {
            layer_norm(normed, x + r * E, model->norm, model->norm_bias, E, model->eps);
            for (int64_t i = 0; i < E; i++) found[r * E + i] = rounded(normed[i]);
        }
    }
    return 0;
}

/* ---- value heads (heads.py) ---- */

typedef struct {
    const W *project, *project_bias, *base, *base_bias; /* hidden layers; NULL: the state itself */
    const float *last, *last_bias, *weight, *mean; /* of the baseline; rows of tokens, their mean */
} Head;

typedef struct {
    int64_t heads, vocab, embed, width, bins, base_width, relu;
    const float *centres; /* of bins; of one bin a number is its own mean */
} Values;

/* The mean of a distribution with these logits, which are spoilt; `count` is padded to LANES. */
static float expected(float *logits, const float *centres, int64_t count) {
    float most = -INFINITY, total = 0, found = 0;
    for (int64_t z = 0; z < count; z++) most = logits[z] > most ? logits[z] : most;
    for (int64_t z = count; z % LANES; z++) logits[z] = most;
    for (int64_t z = 0; z < count; z += LANES) store(logits + z, exponential(load(logits + z) - most));
    for (int64_t z = 0; z < count; z++) {
        total += logits[z];
        found += logits[z] * centres[z];
    }
    return found / total;
}

/* found[rows, picks]: Q(s, a) of tokens[rows, picks] by the mean of all heads or (`least`) the least;
 * `relative`: up to a number a row, of single bins alone. The number of tokens that are none; if
 * there are any nothing is done. work: rows * embed + heads * rows * (width + base_width + bins) +
 * threads * (bins + LANES). */
int64_t values(float *found, const Values *of, const Head *heads, const float *hidden,
               const int64_t *tokens, int64_t least, int64_t relative, int64_t rows, int64_t picks,
               int64_t num_threads, float *work) {
    int64_t E = of->embed, bins = of->bins, width = of->width, rank = width / bins;
    int64_t base_width = of->base_width, count = of->heads;
    int64_t missing = unknown(tokens, rows * picks, of->vocab);
    if (missing) return missing;
    float *states = work, *features = states + rows * E, *bases = features + count * rows * width;
    float *offsets = bases + count * rows * base_width, *own = offsets + count * rows * bins;
    ordered(states, hidden, rows * E);
#pragma omp parallel num_threads(num_threads)
    {
        int64_t me = omp_get_thread_num(), threads = omp_get_num_threads();
        Part wide = part(width, LANES, me, threads), of_base = part(base_width, LANES, me, threads);
        Part numbers = part(count * rows * bins, 1, me, threads);
        Part pairs = part(rows * picks, 1, me, threads);
        float *logits = own + me * (bins + LANES);
        for (int64_t h = 0; h < count; h++) {
            const Head *head = heads + h;
            float *f = features + h * rows * width, *b = bases + h * rows * base_width;
            if (head->project)
                product(f, states, head->project, head->project_bias, E, width, rows, wide.from,
                        wide.until);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = r * width + wide.from; i < r * width + wide.until; i++) {
                    f[i] = head->project ? f[i] : hidden[i];
                    f[i] = of->relu && f[i] < 0 ? 0 : f[i];
                }
            if (relative) continue;
            if (head->base)
                product(b, states, head->base, head->base_bias, E, base_width, rows, of_base.from,
                        of_base.until);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = r * base_width + of_base.from; i < r * base_width + of_base.until; i++)
                    b[i] = !head->base ? hidden[i] : b[i] < 0 ? 0 : b[i];
        }
#pragma omp barrier
        for (int64_t i = numbers.from; i < numbers.until; i++) {
            const Head *head = heads + i / (rows * bins);
            int64_t z = i % bins;
            offsets[i] = 0;
            if (relative) continue;
            offsets[i] = dot(head->last + z * base_width, bases + i / bins * base_width, base_width);
            offsets[i] += head->last_bias[z] - dot(head->mean, features + i * rank, rank);
        }
#pragma omp barrier
        for (int64_t i = pairs.from; i < pairs.until; i++) {
            float joined = least ? INFINITY : 0;
            for (int64_t h = 0; h < count; h++) {
                int64_t at = (h * rows + i / picks) * bins;
                for (int64_t z = 0; z < bins; z++)
                    logits[z] = offsets[at + z] + dot(features + (at + z) * rank,
                                                      heads[h].weight + tokens[i] * rank, rank);
                float q = bins > 1 ? expected(logits, of->centres, bins) : *logits;
                joined = !least ? joined + q / count : q < joined || q != q ? q : joined;
            }
            found[i] = joined;
        }
    }
    return 0;
}
