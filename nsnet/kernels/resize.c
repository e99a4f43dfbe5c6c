/* Bicubic resizing with Pillow's results, byte for byte: `Image.resize` with `Resampling.BICUBIC`, in a third of the
 * time. The captioner's thumbnails are what its authors' preprocessing makes, so that captions do not change.
 *
 * Pillow (13) resamples rows, rounds to 8 bits, then resamples columns; the other way around if the height shrinks by
 * more than twice the pixels that the width does. Weights are fp64 that sum to 1, as integers of 22 fractional bits.
 * Here two rows are resampled at a time, and only the rows that a result needs are kept.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

enum { FRACTION = 22, ROUNDING = 1 << (FRACTION - 1) };

typedef struct {
    ptrdiff_t most;   /* largest number of taps */
    ptrdiff_t *first; /* of each result: position of its first tap */
    ptrdiff_t *taps;  /* of each result: number of taps */
    int32_t *weights; /* of each result: `most` weights */
} filter;

/* Keys' cubic convolution with a = −½. */
static double cubic(double x)
{
    const double a = -0.5;
    x = fabs(x);
    if (x < 1.0)
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
    return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * a : 0.0;
}

static void free_filter(filter *made)
{
    free(made->first);
    free(made->taps);
    free(made->weights);
}

/* The filter that maps `size` samples to `results`. Returns 0, or -1 without memory; `free_filter` frees either. */
static int make_filter(ptrdiff_t size, ptrdiff_t results, filter *made)
{
    double scale = (double)size / (double)results, widened = scale < 1.0 ? 1.0 : scale, reach = 2.0 * widened;
    made->most = (ptrdiff_t)ceil(reach) * 2 + 1;
    made->first = malloc((size_t)results * sizeof *made->first);
    made->taps = malloc((size_t)results * sizeof *made->taps);
    made->weights = malloc((size_t)(results * made->most) * sizeof *made->weights);
    double *exact = malloc((size_t)made->most * sizeof *exact);
    if (!made->first || !made->taps || !made->weights || !exact) {
        free(exact);
        return -1;
    }
    for (ptrdiff_t i = 0; i < results; i++) {
        double center = ((double)i + 0.5) * scale, sum = 0.0, inverse = 1.0 / widened;
        ptrdiff_t first = (ptrdiff_t)(center - reach + 0.5), end = (ptrdiff_t)(center + reach + 0.5);
        first = first < 0 ? 0 : first;
        end = end > size ? size : end;
        for (ptrdiff_t k = 0; k < end - first; k++)
            sum += exact[k] = cubic(((double)(k + first) - center + 0.5) * inverse);
        int32_t *weights = made->weights + i * made->most;
        for (ptrdiff_t k = 0; k < end - first; k++) {
            double weight = (sum == 0.0 ? exact[k] : exact[k] / sum) * (1 << FRACTION);
            weights[k] = (int32_t)(weight < 0.0 ? weight - 0.5 : weight + 0.5);
        }
        made->first[i] = first;
        made->taps[i] = end - first;
    }
    free(exact);
    return 0;
}

INLINE uint8_t to_level(int32_t sum)
{
    sum >>= FRACTION;
    return (uint8_t)(sum < 0 ? 0 : sum > 255 ? 255 : sum);
}

/* Resample two rows of `width` pixels to `side`. `pixels`: room for a vector a pixel, R G B 0 of one row and of the
 * other. */
INLINE void resize_rows(const uint8_t *one, const uint8_t *other, ptrdiff_t width, ptrdiff_t side, const filter *across,
                        integers *pixels, uint8_t *one_result, uint8_t *other_result)
{
    for (ptrdiff_t i = 0; i < width; i++, one += 3, other += 3)
        pixels[i] = (integers){one[0], one[1], one[2], 0, other[0], other[1], other[2], 0};
    for (ptrdiff_t i = 0; i < side; i++) {
        const int32_t *weights = across->weights + i * across->most;
        const integers *from = pixels + across->first[i];
        integers sums = {0};
        sums += ROUNDING;
        for (ptrdiff_t k = 0; k < across->taps[i]; k++)
            sums += weights[k] * from[k];
        for (int channel = 0; channel < 3; channel++) {
            one_result[3 * i + channel] = to_level(sums[channel]);
            other_result[3 * i + channel] = to_level(sums[4 + channel]);
        }
    }
}

/* Weighted sum of rows of `length` bytes. */
INLINE void blend_rows(const uint8_t *const *rows, ptrdiff_t taps, const int32_t *weights, ptrdiff_t length,
                       uint8_t *result)
{
    enum { BLOCK = 64 };
    for (ptrdiff_t at = 0; at < length; at += BLOCK) {
        int32_t sums[BLOCK];
        ptrdiff_t count = length - at < BLOCK ? length - at : BLOCK;
        for (int i = 0; i < BLOCK; i++)
            sums[i] = ROUNDING;
        for (ptrdiff_t k = 0; k < taps; k++) {
            const uint8_t *row = rows[k] + at;
            if (count == BLOCK)
                for (int i = 0; i < BLOCK; i++)
                    sums[i] += weights[k] * row[i];
            else
                for (int i = 0; i < count; i++)
                    sums[i] += weights[k] * row[i];
        }
        for (int i = 0; i < count; i++)
            result[at + i] = to_level(sums[i]);
    }
}

/* What one call needs. */
typedef struct {
    filter across, down;
    integers *pixels;     /* two rows, as `resize_rows` needs them */
    uint8_t *lines;        /* rows between the two passes */
    const uint8_t **rows;  /* of the rows that a result needs */
} workspace;

static void free_workspace(workspace *made)
{
    free_filter(&made->across);
    free_filter(&made->down);
    free(made->pixels);
    free(made->lines);
    free(made->rows);
}

/* Returns 0, or -1 without memory. */
static int make_workspace(ptrdiff_t height, ptrdiff_t width, ptrdiff_t side, int is_column_first, workspace *made)
{
    *made = (workspace){0};
    if (make_filter(width, side, &made->across) < 0 || make_filter(height, side, &made->down) < 0) {
        free_workspace(made);
        return -1;
    }
    size_t line_bytes = (size_t)(is_column_first ? 2 * 3 * width : (made->down.most + 2) * 3 * side);
    made->pixels = aligned_alloc(sizeof(integers), (size_t)width * sizeof(integers));
    made->lines = malloc(line_bytes);
    made->rows = malloc((size_t)made->down.most * sizeof *made->rows);
    if (made->pixels && made->lines && made->rows)
        return 0;
    free_workspace(made);
    return -1;
}

INLINE void rows_first(const uint8_t *samples, ptrdiff_t stride, ptrdiff_t height, ptrdiff_t width, ptrdiff_t side,
                       const workspace *work, uint8_t *result)
{
    const filter *down = &work->down;
    /* Row r lies in line r modulo `capacity`. A result needs `most` rows, and rows are made in pairs. */
    ptrdiff_t length = 3 * side, capacity = down->most + 2, made = 0;
    for (ptrdiff_t i = 0; i < side; i++) {
        ptrdiff_t first = down->first[i], taps = down->taps[i];
        made = made < first ? first : made;
        for (; made < first + taps; made += 2) {
            ptrdiff_t other = made + 1 < height ? made + 1 : made;
            resize_rows(samples + made * stride, samples + other * stride, width, side, &work->across, work->pixels,
                        work->lines + made % capacity * length, work->lines + (made + 1) % capacity * length);
        }
        for (ptrdiff_t k = 0; k < taps; k++)
            work->rows[k] = work->lines + (first + k) % capacity * length;
        blend_rows(work->rows, taps, down->weights + i * down->most, length, result + i * length);
    }
}

INLINE void columns_first(const uint8_t *samples, ptrdiff_t stride, ptrdiff_t width, ptrdiff_t side,
                          const workspace *work, uint8_t *result)
{
    const filter *down = &work->down;
    for (ptrdiff_t i = 0; i < side; i += 2) {
        ptrdiff_t results[2] = {i, i + 1 < side ? i + 1 : i};
        for (int line = 0; line < 2; line++) {
            ptrdiff_t at = results[line];
            for (ptrdiff_t k = 0; k < down->taps[at]; k++)
                work->rows[k] = samples + (down->first[at] + k) * stride;
            blend_rows(work->rows, down->taps[at], down->weights + at * down->most, 3 * width,
                       work->lines + line * 3 * width);
        }
        resize_rows(work->lines, work->lines + 3 * width, width, side, &work->across, work->pixels,
                    result + 3 * side * results[0], result + 3 * side * results[1]);
    }
}

INLINE int resize(const uint8_t *samples, ptrdiff_t stride, ptrdiff_t height, ptrdiff_t width, ptrdiff_t side,
                  uint8_t *result)
{
    workspace work;
    int is_column_first = height > side && height - side > 2 * (width - side);
    if (make_workspace(height, width, side, is_column_first, &work) < 0)
        return -1;
    if (is_column_first)
        columns_first(samples, stride, width, side, &work, result);
    else
        rows_first(samples, stride, height, width, side, &work, result);
    free_workspace(&work);
    return 0;
}

static int resize_portably(const uint8_t *samples, ptrdiff_t stride, ptrdiff_t height, ptrdiff_t width, ptrdiff_t side,
                           uint8_t *result)
{
    return resize(samples, stride, height, width, side, result);
}

FAST_VARIANT static int resize_fast(const uint8_t *samples, ptrdiff_t stride, ptrdiff_t height, ptrdiff_t width,
                                    ptrdiff_t side, uint8_t *result)
{
    return resize(samples, stride, height, width, side, result);
}

int resize_bicubic(const uint8_t *samples, ptrdiff_t stride, ptrdiff_t height, ptrdiff_t width, ptrdiff_t side,
                   int is_portable, uint8_t *result)
{
    int is_fast = !is_portable && has_fast_variant();
    return (is_fast ? resize_fast : resize_portably)(samples, stride, height, width, side, result);
}
