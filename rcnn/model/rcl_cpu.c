/* A recurrent convolutional layer on the CPU, forward and backward, its 3x3 convolutions by Winograd's minimal filtering F(4x4, 3x3).
 *
 * A tile of 4x4 outputs is 36 products instead of 144: its 6x6 inputs and the kernel are evaluated at 6x6 points ("planes"
 * below, one for each pair of points), multiplied there, map by map, as 36 matrix products, and interpolated. The points are
 * 0, +-A, +-B and infinity (Lavin and Gray, 2016, have 0, +-1, +-2): these have half of the rounding error, and their powers
 * are exact in float32. With D an input tile, W a kernel, Y an output tile:
 *
 *     Y = at [(g W g') . (bt D bt')] at'
 *
 * The backward pass is the transpose of each factor, so the planes of the output's gradient serve both gradients.
 *
 * A thread takes a few images through all time steps, so that their states stay in its cache: LRN joins maps, not images or
 * positions, and no image waits for another. Compiled by rcl_cpu.py with the macros of lrn_cpu.c; MAPS is a multiple of 8.
 *
 * Tensors are (images, height, width, MAPS); kernels come and go as planes, (36, MAPS in, MAPS out).
 */
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "dropout.c"
#include "lrn_cpu.c"

#ifdef __AVX512F__ /* 32 registers of 64 bytes; elsewhere 16 of 32 bytes, or 32 of 16 */
#define IS_WIDE 1
#else
#define IS_WIDE 0
#endif
#define VECTOR_BYTES (IS_WIDE && MAPS * sizeof(real) % 64 == 0 ? 64 : 32)

typedef real vec __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));

#define A ((real)0.625)
#define B ((real)1.5)
#define AA (A * A)
#define BB (B * B)

enum {
  POINTS = 6,
  PLANES = POINTS * POINTS,
  TILE = 4,                                        /* outputs of a tile, in each direction */
  TILES = MAPS > 128 ? 64 : 32,                    /* tiles per chunk: few enough for the cache, and enough for the products */
  LANES = VECTOR_BYTES / sizeof(real),
  VECTORS = MAPS / LANES,
  WIDE = IS_WIDE && VECTORS % 3 == 0 ? 3 : VECTORS % 2 == 0 ? 2 : 1, /* vectors and rows of a product that are summed in */
  TALL = IS_WIDE ? 8 : 4,                                            /* registers: 24 of 32, or 8 of 16 */
  PLANE = TILES * MAPS + 16,                       /* not a multiple of 4 KiB, which would put all planes into the same cache sets */
};

typedef struct {
  long images, height, width;
} shape;

/* The chunk's planes of inputs and of outputs, (PLANES, TILES, MAPS) each, and a line of zeros: what is around an image. */
typedef struct {
  real in[PLANES * PLANE] __attribute__((aligned(64)));
  real out[PLANES * PLANE] __attribute__((aligned(64)));
  real zeros[MAPS] __attribute__((aligned(64)));
} chunk;

/* ---- evaluation and interpolation in one direction ---- */

/* bt d: inputs at the points. */
static inline void evaluate(const vec d[6], vec v[6]) {
  vec even_a = d[4] - BB * d[2], odd_a = A * (d[3] - BB * d[1]);
  vec even_b = d[4] - AA * d[2], odd_b = B * (d[3] - AA * d[1]);
  v[0] = d[4] - (AA + BB) * d[2] + (AA * BB) * d[0];
  v[1] = even_a + odd_a;
  v[2] = even_a - odd_a;
  v[3] = even_b + odd_b;
  v[4] = even_b - odd_b;
  v[5] = d[5] - (AA + BB) * d[3] + (AA * BB) * d[1];
}

/* bt' v: the gradient of the inputs. */
static inline void evaluate_back(const vec v[6], vec d[6]) {
  vec even_a = v[1] + v[2], odd_a = A * (v[1] - v[2]);
  vec even_b = v[3] + v[4], odd_b = B * (v[3] - v[4]);
  d[0] = (AA * BB) * v[0];
  d[1] = (AA * BB) * v[5] - BB * odd_a - AA * odd_b;
  d[2] = -(AA + BB) * v[0] - BB * even_a - AA * even_b;
  d[3] = odd_a + odd_b - (AA + BB) * v[5];
  d[4] = v[0] + even_a + even_b;
  d[5] = v[5];
}

/* at m: outputs. */
static inline void interpolate(const vec m[6], vec y[4]) {
  vec even_a = m[1] + m[2], odd_a = A * (m[1] - m[2]);
  vec even_b = m[3] + m[4], odd_b = B * (m[3] - m[4]);
  y[0] = m[0] + even_a + even_b;
  y[1] = odd_a + odd_b;
  y[2] = AA * even_a + BB * even_b;
  y[3] = AA * odd_a + BB * odd_b + m[5];
}

/* at' y: the gradient of the outputs at the points. */
static inline void interpolate_back(const vec y[4], vec m[6]) {
  vec even_a = y[0] + AA * y[2], odd_a = A * (y[1] + AA * y[3]);
  vec even_b = y[0] + BB * y[2], odd_b = B * (y[1] + BB * y[3]);
  m[0] = y[0];
  m[1] = even_a + odd_a;
  m[2] = even_a - odd_a;
  m[3] = even_b + odd_b;
  m[4] = even_b - odd_b;
  m[5] = y[3];
}

/* ---- tiles to planes and back ---- */

static inline long tiles_along(long side) { return (side + TILE - 1) / TILE; }
static inline long tiles_of(shape s) { return s.images * tiles_along(s.height) * tiles_along(s.width); }
static inline long positions_of(shape s) { return s.images * s.height * s.width; }

/* The addresses in x of a square of side x side positions that begins `border` above and to the left of a tile; `outside` for
 * the positions beyond the edge of the image. */
static inline void locate(real *x, shape s, long tile, int side, int border, real *outside, real *at[]) {
  long across = tiles_along(s.width), down = tiles_along(s.height);
  long image = tile / (across * down), top = tile / across % down * TILE - border, left = tile % across * TILE - border;
  for (int i = 0; i < side; i++)
    for (int j = 0; j < side; j++) {
      long row = top + i, column = left + j;
      int inside = row >= 0 && row < s.height && column >= 0 && column < s.width;
      at[i * side + j] = inside ? x + ((image * s.height + row) * s.width + column) * MAPS : outside;
    }
}

#define AT(pointer) (*(vec *)(pointer))

/* out = f in f', vectors at the addresses `in` + k: f makes `to` vectors of `from`, in one direction and then in the other. */
static inline __attribute__((always_inline)) void both_directions(void f(const vec *, vec *), int from, int to, real *const in[],
                                                                  long k, vec *out) {
  vec half[POINTS][POINTS], line[POINTS];
  for (int j = 0; j < from; j++) {
    for (int i = 0; i < from; i++) line[i] = AT(in[i * from + j] + k);
    f(line, half[j]);
  }
  for (int i = 0; i < to; i++) {
    for (int j = 0; j < from; j++) line[j] = half[j][i];
    f(line, out + i * to);
  }
}

/* The addresses of a tile in its planes. */
static inline void locate_planes(real *planes, long tile, real *at[PLANES]) {
  for (int i = 0; i < PLANES; i++) at[i] = planes + i * PLANE + tile * MAPS;
}

static void inputs_to_planes(const real *x, shape s, long first, long num, real *planes, real *zeros) {
  for (long tile = 0; tile < num; tile++) {
    real *from[PLANES], *to[PLANES];
    locate((real *)x, s, first + tile, POINTS, 1, zeros, from);
    locate_planes(planes, tile, to);
    for (long k = 0; k < MAPS; k += LANES) {
      vec values[PLANES];
      both_directions(evaluate, POINTS, POINTS, from, k, values);
      for (int i = 0; i < PLANES; i++) AT(to[i] + k) = values[i];
    }
  }
}

/* Adds the gradient of the inputs; tiles overlap. */
static void planes_to_input_gradient(const real *planes, shape s, long first, long num, real *dx) {
  real unread[MAPS];
  for (long tile = 0; tile < num; tile++) {
    real *from[PLANES], *to[PLANES];
    locate_planes((real *)planes, tile, from);
    locate(dx, s, first + tile, POINTS, 1, unread, to);
    for (long k = 0; k < MAPS; k += LANES) {
      vec values[PLANES];
      both_directions(evaluate_back, POINTS, POINTS, from, k, values);
      for (int i = 0; i < PLANES; i++) AT(to[i] + k) += values[i];
    }
  }
}

static void planes_to_outputs(const real *planes, shape s, long first, long num, const real *bias, real *y) {
  real unread[MAPS];
  for (long tile = 0; tile < num; tile++) {
    real *from[PLANES], *to[TILE * TILE];
    locate_planes((real *)planes, tile, from);
    locate(y, s, first + tile, TILE, 0, unread, to);
    for (long k = 0; k < MAPS; k += LANES) {
      vec values[TILE * TILE];
      both_directions(interpolate, POINTS, TILE, from, k, values);
      for (int i = 0; i < TILE * TILE; i++) AT(to[i] + k) = values[i] + AT(bias + k);
    }
  }
}

static void output_gradient_to_planes(const real *dy, shape s, long first, long num, real *planes, real *zeros) {
  for (long tile = 0; tile < num; tile++) {
    real *from[TILE * TILE], *to[PLANES];
    locate((real *)dy, s, first + tile, TILE, 0, zeros, from);
    locate_planes(planes, tile, to);
    for (long k = 0; k < MAPS; k += LANES) {
      vec values[PLANES];
      both_directions(interpolate_back, TILE, POINTS, from, k, values);
      for (int i = 0; i < PLANES; i++) AT(to[i] + k) = values[i];
    }
  }
}

/* ---- products ---- */

/* TALL rows and WIDE vectors of c = a b, or c += a b; element (i, s) of a is a[i * a_row + s * a_step]. */
static inline void product_tile(const real *a, long a_row, long a_step, const real *b, real *c, long depth, int adds) {
  const vec none = {0};
  vec sums[TALL][WIDE];
#pragma GCC unroll 8
  for (int i = 0; i < TALL; i++)
#pragma GCC unroll 3
    for (int j = 0; j < WIDE; j++) sums[i][j] = none;
  if (adds) {
#pragma GCC unroll 8
    for (int i = 0; i < TALL; i++)
#pragma GCC unroll 3
      for (int j = 0; j < WIDE; j++) sums[i][j] = AT(c + i * MAPS + j * LANES);
  }
  for (long s = 0; s < depth; s++) {
    vec right[WIDE];
#pragma GCC unroll 3
    for (int j = 0; j < WIDE; j++) right[j] = AT(b + s * MAPS + j * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < TALL; i++) {
      vec left = a[i * a_row + s * a_step] - none;
#pragma GCC unroll 3
      for (int j = 0; j < WIDE; j++) sums[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < TALL; i++)
#pragma GCC unroll 3
    for (int j = 0; j < WIDE; j++) AT(c + i * MAPS + j * LANES) = sums[i][j];
}

/* out = in kernel, for each plane: (num, MAPS) (MAPS, MAPS). */
static void multiply(const real *in, const real *kernel, real *out, long num) {
  for (int plane = 0; plane < PLANES; plane++, in += PLANE, out += PLANE, kernel += MAPS * MAPS)
    for (long k = 0; k < MAPS; k += WIDE * LANES)
      for (long tile = 0; tile < num; tile += TALL)
        product_tile(in + tile * MAPS, MAPS, 1, kernel + k, out + tile * MAPS + k, MAPS, 0);
}

/* kernel += in' out, for each plane: (MAPS, num) (num, MAPS). */
static void add_correlation(const real *in, const real *out, real *kernel, long num) {
  for (int plane = 0; plane < PLANES; plane++, in += PLANE, out += PLANE, kernel += MAPS * MAPS)
    for (long k = 0; k < MAPS; k += WIDE * LANES)
      for (long c = 0; c < MAPS; c += TALL) product_tile(in + c, 1, MAPS, out + k, kernel + c * MAPS + k, num, 1);
}

/* ---- convolutions of a few images ---- */

static inline long chunk_from(long first, long num) { return num - first < TILES ? num - first : TILES; }

static void convolve(const real *x, const real *kernel, const real *bias, real *y, shape s, chunk *c) {
  for (long first = 0, all = tiles_of(s); first < all; first += TILES) {
    long num = chunk_from(first, all);
    inputs_to_planes(x, s, first, num, c->in, c->zeros);
    multiply(c->in, kernel, c->out, num);
    planes_to_outputs(c->out, s, first, num, bias ? bias : c->zeros, y);
  }
}

/* dkernel += the gradient of the kernel; dx = that of the input. `turned` has the kernel's planes transposed. */
static void convolve_back(const real *x, const real *turned, const real *dy, real *dkernel, real *dx, shape s, chunk *c) {
  memset(dx, 0, sizeof(real) * MAPS * positions_of(s));
  for (long first = 0, all = tiles_of(s); first < all; first += TILES) {
    long num = chunk_from(first, all);
    inputs_to_planes(x, s, first, num, c->in, c->zeros);
    output_gradient_to_planes(dy, s, first, num, c->out, c->zeros);
    add_correlation(c->in, c->out, dkernel, num);
    multiply(c->out, turned, c->in, num);
    planes_to_input_gradient(c->in, s, first, num, dx);
  }
}

/* ---- the layer ---- */

typedef struct {
  long images, height, width, steps;     /* steps: T */
  const real *feed_forward, *recurrent;  /* planes; recurrent is null if T = 0 */
  const real *feed_forward_turned, *recurrent_turned; /* with inputs and outputs exchanged, for the backward pass */
  const real *bias;
  double scale;                          /* of LRN: alpha / N */
  uint32_t name[4], rate;                /* of the dropout; see dropout.c */
  int adds_input;                        /* whether each step adds z(0) (RCNN), or only the bias (the recursive network) */
  int threads;
} layer;

static void normalise(real *z, const real *plus, real *y, long rows, real scale) {
  block squares = {{0}, {0}};
  for (long row = 0; row < rows; row += ROWS) {
    long at = row * MAPS;
    forward_block(&squares, z + at, plus ? plus + at : 0, y + at, rows_from(row, rows), scale);
  }
}

static void normalise_back(const real *g, const real *z, real *dz, long rows, real scale) {
  block squares = {{0}, {0}}, inner = {{0}, {0}};
  for (long row = 0; row < rows; row += ROWS) {
    long at = row * MAPS;
    backward_block(&squares, &inner, g + at, z + at, dz + at, rows_from(row, rows), scale);
  }
}

static void drop(const layer *l, shape s, long first, real *x) {
  long image = s.height * s.width * MAPS;
  for (long i = 0; l->rate && i < s.images; i++) {
    real *one = x + i * image;
    drop_image(one, one, image, first + i, l->name, l->rate);
  }
}

/* z(0) to z(T) and x(T) of a few images; z(t) is at z + t * stride. */
static void forward(const layer *l, shape s, const real *u, real *z, long stride, real *x, chunk *c) {
  for (long t = 0; t <= l->steps; t++) {
    const real *bias = t == 0 || !l->adds_input ? l->bias : 0, *plus = t > 0 && l->adds_input ? z : 0;
    convolve(t ? x : u, t ? l->recurrent : l->feed_forward, bias, z + t * stride, s, c);
    normalise(z + t * stride, plus, x, positions_of(s), l->scale);
  }
}

static inline void add(real *sum, const real *values, long num) {
  for (long i = 0; i < num; i++) sum[i] += values[i];
}

/* The sums that a thread collects over its images. */
typedef struct {
  real *feed_forward, *recurrent, *bias;
} gradients;

enum { KERNEL = PLANES * MAPS * MAPS };

static inline gradients gradients_in(real *sums, long steps) {
  return (gradients){sums, sums + KERNEL, sums + (steps ? 2 : 1) * KERNEL};
}

/* g is the gradient of x(T), and is overwritten; x, dz and sum are scratch of the same size. */
static void backward(const layer *l, shape s, const real *u, real *z, long stride, real *g, real *x, real *dz, real *sum, real *du,
                     gradients d, chunk *c) {
  long rows = positions_of(s), num = rows * MAPS;
  memset(sum, 0, sizeof(real) * num);
  for (long t = l->steps; t > 0; t--) {
    normalise_back(g, z + t * stride, dz, rows, l->scale);
    add(sum, dz, num);
    normalise(z + (t - 1) * stride, 0, x, rows, l->scale); /* x(t-1) again, which costs less than its memory */
    convolve_back(x, l->recurrent_turned, dz, d.recurrent, g, s, c);
  }
  normalise_back(g, z, dz, rows, l->scale);
  add(sum, dz, num);
  convolve_back(u, l->feed_forward_turned, l->adds_input ? sum : dz, d.feed_forward, du, s, c);
  for (long row = 0; row < rows; row++) add(d.bias, sum + row * MAPS, MAPS);
}

/* Images that a thread takes at a time: enough to fill a chunk, if they are small. */
static inline long images_at_a_time(const layer *l) {
  long tiles = tiles_of((shape){1, l->height, l->width});
  return tiles < TILES ? TILES / tiles : 1;
}

static inline shape images_from(const layer *l, long first) {
  long num = images_at_a_time(l), left = l->images - first;
  return (shape){left < num ? left : num, l->height, l->width};
}

static void *memory(long elements) { /* in whole cache lines */
  return aligned_alloc(64, (elements * sizeof(real) + 63) / 64 * 64);
}

/* A chunk, and room for `states` states of the images that a thread takes at a time; null if there is no memory. */
static chunk *chunk_and(const layer *l, long states) {
  long state = images_at_a_time(l) * l->height * l->width * MAPS;
  chunk *c = memory(sizeof(chunk) / sizeof(real) + states * state);
  if (c) memset(c, 0, sizeof(chunk));
  return c;
}

/* x(T), and z(0) to z(T), (T + 1, images, height, width, MAPS), unless z is null. Returns 1 if there is no memory. */
int rcl_forward(const layer *l, const real *u, real *z, real *x) {
  long image = l->height * l->width * MAPS, step = images_at_a_time(l);
  int failed = 0;
#pragma omp parallel num_threads(l->threads) reduction(| : failed)
  {
    chunk *c = chunk_and(l, z ? 0 : l->steps + 1);
    failed = !c;
#pragma omp for schedule(static)
    for (long first = 0; first < l->images; first += step) {
      if (!c) continue;
      shape s = images_from(l, first);
      long at = first * image;
      forward(l, s, u + at, z ? z + at : (real *)(c + 1), z ? l->images * image : step * image, x + at, c);
      drop(l, s, first, x + at);
    }
    free(c);
  }
  return failed;
}

/* From dx, the gradient of x(T): du, and the gradients of the feed-forward planes, the recurrent ones (unless T = 0) and the bias,
 * one after the other in `sums`. A null z is computed again. Returns 1 if there is no memory. */
int rcl_backward(const layer *l, const real *u, const real *z, const real *dx, real *du, real *sums) {
  long image = l->height * l->width * MAPS, step = images_at_a_time(l), state = step * image;
  long num_sums = (l->steps ? 2 : 1) * KERNEL + MAPS;
  real *all_sums = memory(num_sums * l->threads);
  int failed = !all_sums;
  if (failed) return failed;
#pragma omp parallel num_threads(l->threads) reduction(| : failed)
  {
    real *own_sums = all_sums + omp_get_thread_num() * num_sums;
    memset(own_sums, 0, sizeof(real) * num_sums);
    chunk *c = chunk_and(l, 4 + (z ? 0 : l->steps + 1));
    failed = !c;
#pragma omp for schedule(static)
    for (long first = 0; first < l->images; first += step) {
      if (!c) continue;
      shape s = images_from(l, first);
      real *g = (real *)(c + 1), *x = g + state, *dz = x + state, *sum = dz + state;
      real *own_z = z ? (real *)z + first * image : sum + state;
      long at = first * image, stride = z ? l->images * image : state;
      if (!z) forward(l, s, u + at, own_z, stride, x, c);
      memcpy(g, dx + at, sizeof(real) * s.images * image);
      drop(l, s, first, g);
      backward(l, s, u + at, own_z, stride, g, x, dz, sum, du + at, gradients_in(own_sums, l->steps), c);
    }
    free(c);
    int threads = omp_get_num_threads();
#pragma omp for schedule(static)
    for (long i = 0; i < num_sums; i++) { /* in the order of the threads, so that each run has the same bits */
      sums[i] = all_sums[i];
      for (int thread = 1; thread < threads; thread++) sums[i] += all_sums[thread * num_sums + i];
    }
  }
  free(all_sums);
  return failed;
}
