/* Estimates the spectral entropies of an image's 32 px patches in fp32: `nsnet.entropy` in C, 3 times as fast as in
 * numpy. Both are within `nsnet.entropy.MARGIN` of the exact entropies, which alone rank patches, so that both give the
 * same mosaics.
 *
 * A patch is transformed by two matrix products with a real Fourier basis: rows 0 to 16 are cosines of these
 * frequencies, rows 17 to 31 are sines of the frequencies 1 to 15.
 */
#include <math.h>

#include "kernels.h"

enum { SIDE = PATCH_PX, HALF = SIDE / 2, SINE = HALF + 1, PAIRS = HALF - 1 };
/* Frequencies of a real transform that differ: 2 · 15² + 4 · 15 occur twice in the whole transform, padded to vectors;
 * 4 occur once, of which the constant one is kept apart. */
enum { TWICE = (2 * PAIRS * PAIRS + 4 * PAIRS + LANES - 1) / LANES * LANES, POWERS = TWICE + LANES };

typedef float matrix[SIDE][SIDE] __attribute__((aligned(64)));

static matrix basis, transposed;

INLINE void multiply(const matrix left, const matrix right, matrix result)
{
    for (int row = 0; row < SIDE; row += 4)
        for (int column = 0; column < SIDE; column += 2 * LANES) {
            floats sums[4][2] = {0};
            for (int k = 0; k < SIDE; k++) {
                const floats *terms = (const floats *)&right[k][column];
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    sums[i][0] += left[row + i][k] * terms[0];
                    sums[i][1] += left[row + i][k] * terms[1];
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                floats *target = (floats *)&result[row + i][column];
                target[0] = sums[i][0];
                target[1] = sums[i][1];
            }
        }
}

/* log x of normal positive numbers: x = m · 2^e with √½ ≤ m < √2, log m = 2 artanh((m − 1)/(m + 1)), to 3e-8. */
INLINE floats logarithm(floats x)
{
    integers bits = (integers)x, exponent = (bits - 0x3f3504f3) >> 23;
    floats m = (floats)(bits - (exponent << 23));
    floats s = (m - 1.0f) / (m + 1.0f), square = s * s;
    floats series = 2.0f + square * (2.0f / 3.0f + square * (2.0f / 5.0f + square * (2.0f / 7.0f)));
    return __builtin_convertvector(exponent, floats) * 0.69314718f + s * series;
}

INLINE float square_of(float x)
{
    return x * x;
}

/* |F|² of the frequencies that occur twice, then of those that occur once. F of a pair of frequencies is
 * (cos·cos − sin·sin) − i(cos·sin + sin·cos), and with the other signs for its mirrored pair. */
INLINE void powers_of(const matrix both, float *power)
{
    for (int down = 1; down < HALF; down++) {
        const float *cosine = both[down], *sine = both[HALF + down];
        for (int i = 0; i < PAIRS; i++) {
            float cc = cosine[1 + i], cs = cosine[SINE + i], sc = sine[1 + i], ss = sine[SINE + i];
            power[i] = square_of(cc - ss) + square_of(cs + sc);
            power[PAIRS + i] = square_of(cc + ss) + square_of(cs - sc);
        }
        power += 2 * PAIRS;
    }
    for (int edge = 0; edge <= HALF; edge += HALF)
        for (int i = 0; i < PAIRS; i++) {
            *power++ = square_of(both[edge][1 + i]) + square_of(both[edge][SINE + i]);
            *power++ = square_of(both[1 + i][edge]) + square_of(both[SINE + i][edge]);
        }
    for (int i = 2 * PAIRS * PAIRS + 4 * PAIRS; i < TWICE; i++)
        *power++ = 0.0f;
    *power++ = square_of(both[0][HALF]);
    *power++ = square_of(both[HALF][0]);
    *power++ = square_of(both[HALF][HALF]);
    for (int i = 3; i < LANES; i++)
        *power++ = 0.0f;
}

/* Add weights w, and w · log |F|², of as many frequencies as a vector holds. */
INLINE void add_weights(const float *power, int is_power, floats *total, floats *weighted)
{
    floats weight = *(const floats *)power + 1e-30f, logs = logarithm(weight);
    if (!is_power)
        for (int i = 0; i < LANES; i++)
            weight[i] = sqrtf(weight[i]);
    *total += weight;
    *weighted += weight * logs;
}

/* Grey level of an RGB pixel: 3 times the mean, or 1000 times the luma (ITU-R BT.601), of which LUMA_SCALE makes
 * numbers in the range of the mean's: logarithms of large powers have large rounding errors. */
#define LUMA_SCALE (1.0f / 256.0f)
INLINE int level_of(const uint8_t *pixel, int is_luma)
{
    return is_luma ? 299 * pixel[0] + 587 * pixel[1] + 114 * pixel[2] : pixel[0] + pixel[1] + pixel[2];
}

/* Entropy in nats of a patch of interleaved RGB samples; 0 if all its grey levels are equal, else above 0. */
INLINE double entropy_of(const uint8_t *samples, ptrdiff_t stride, int is_power, int is_luma)
{
    matrix grey, half;
    float power[POWERS] __attribute__((aligned(64)));
    /* Without its first level, a bright, almost flat patch has no rounding errors that exceed its other frequencies. */
    int first = level_of(samples, is_luma);
    float scale = is_luma ? LUMA_SCALE : 1.0f;
    for (int row = 0; row < SIDE; row++, samples += stride) {
        __builtin_prefetch(samples + 2 * 3 * SIDE); /* two patches ahead: the processor follows fewer than 32 rows */
        __builtin_prefetch(samples + 2 * 3 * SIDE + 64);
        for (int i = 0; i < SIDE; i++)
            grey[row][i] = (float)(level_of(samples + 3 * i, is_luma) - first) * scale;
    }
    multiply(basis, grey, half);
    multiply(half, transposed, grey);
    double constant = grey[0][0] + (double)(SIDE * SIDE) * first * scale;
    powers_of(grey, power);

    floats total = {0}, weighted = {0};
    for (int k = 0; k < TWICE; k += LANES)
        add_weights(power + k, is_power, &total, &weighted);
    total *= 2.0f;
    weighted *= 2.0f;
    add_weights(power + TWICE, is_power, &total, &weighted);
    double varying = 0.0, sum = 0.0;
    for (int i = 0; i < LANES; i++) {
        varying += total[i];
        sum += weighted[i];
    }
    if (varying < 1e-6) /* 0, but for the 1e-30; a level that differs by 1, scaled, contributes more */
        return 0.0;
    if (is_power)
        constant *= constant;
    else
        sum /= 2.0; /* log √p = (log p) / 2 */
    if (constant > 0.0)
        sum += constant * log(constant);
    varying += constant;
    return fmax(log(varying) - sum / varying, 1e-8);
}

INLINE void estimate_all(const uint8_t *samples, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns, int is_power,
                         int is_luma, double *entropy)
{
    for (ptrdiff_t row = 0; row < rows; row++)
        for (ptrdiff_t column = 0; column < columns; column++)
            *entropy++ = entropy_of(samples + SIDE * (row * stride + 3 * column), stride, is_power, is_luma);
}

static void estimate_portably(const uint8_t *samples, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns, int is_power,
                              int is_luma, double *entropy)
{
    estimate_all(samples, stride, rows, columns, is_power, is_luma, entropy);
}

FAST_VARIANT static void estimate_fast(const uint8_t *samples, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns,
                                       int is_power, int is_luma, double *entropy)
{
    estimate_all(samples, stride, rows, columns, is_power, is_luma, entropy);
}

void estimate_entropy(const uint8_t *samples, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns, int is_power,
                      int is_portable, int is_luma, double *entropy)
{
    int is_fast = !is_portable && has_fast_variant();
    (is_fast ? estimate_fast : estimate_portably)(samples, stride, rows, columns, is_power, is_luma, entropy);
}

void prepare_entropy(void)
{
    for (int i = 0; i < SIDE; i++)
        for (int row = 0; row < SIDE; row++) {
            int frequency = row <= HALF ? row : row - HALF;
            double angle = 2.0 * 3.14159265358979323846 * (frequency * i % SIDE) / SIDE;
            basis[row][i] = transposed[i][row] = (float)(row <= HALF ? cos(angle) : sin(angle));
        }
}
