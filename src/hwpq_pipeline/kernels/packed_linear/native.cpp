// The product of a packed 2:4 weight and a few rows of inputs, on x86 with AVX2, and in plain C++ elsewhere.
//
// Layout (`packed_linear.layout`): eight rows side by side, a word of 32 inputs at a time. Of each row a word keeps 16
// values and 16 two-bit places, so that the places of eight rows fill a vector of 32 bytes.
//
// Integers (int8, and int4 as two codes a byte): the inputs are rounded to INT8 with a scale for each word. A byte
// shuffle picks the inputs of 32 kept values by their places. Their products are summed in pairs by `maddubs`, which
// wants an unsigned factor: |v| and x with the sign of v. 127 * 127 * 2 fits in 16 bits. With VNNI one instruction takes
// the place of three.
//
// Floats (float32, bfloat16, float16, E4M3): the inputs stay float32. A permutation of four floats picks them.
//
// The rows of a weight are shared out among torch's own threads, so that no second pool fights for the cores.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>
#include <torch/types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define HWPQ_AVX2 1
#endif

namespace {

constexpr int64_t ROWS = 8, WORD = 32, KEPT = WORD / 2, PLACES = 32;
// A block of rows times a word takes some 15 ns; threads take no less than a few microseconds of work.
constexpr int64_t SMALLEST_SHARE = 512;

enum Kind : int64_t { FLOAT32, BFLOAT16, FLOAT16, E4M3, INT8, INT4 };

// What a long prompt is multiplied in: 16-bit products are slow where the processor has none.
at::ScalarType multiplied_in(at::ScalarType given) {
#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
  if (given == at::kBFloat16) return given;
#endif
  return given == at::kDouble ? given : at::kFloat;
}

int64_t bytes_of(int64_t kind) {
  switch (kind) {
    case FLOAT32: return ROWS * KEPT * 4;
    case BFLOAT16:
    case FLOAT16: return ROWS * KEPT * 2;
    case INT4: return ROWS * KEPT / 2;
    default: return ROWS * KEPT;
  }
}

bool whole(int64_t kind) { return kind == INT8 || kind == INT4; }

// Rows of inputs up to which the kernel is faster than to unpack the weight and multiply; measured with AVX2. Integers
// are always faster in the kernel there, as no other product of this processor takes bytes.
int64_t most_rows(int64_t kind) {
  if (!whole(kind)) return 192;
#if !defined(HWPQ_AVX2)
  return 16;
#elif defined(__AMX_BF16__)
  return 256;
#else
  return std::numeric_limits<int64_t>::max();
#endif
}

// The places of an integer word are bytes: byte j of row r has, at bits 2k, the place of the value (k, j). Those of a
// float word are 32-bit words: bits 2m of row r's word are the place of value m.
inline int place_of(const uint8_t* places, bool integers, int64_t row, int64_t kept) {
  if (integers) return places[row * 4 + kept % 4] >> (2 * (kept / 4)) & 3;
  uint32_t word;
  std::memcpy(&word, places + row * 4, 4);
  return word >> (2 * kept) & 3;
}

inline float half_to_float(uint16_t bits) { return static_cast<float>(c10::Half(bits, c10::Half::from_bits())); }

inline float value_of(const uint8_t* values, int64_t kind, int64_t row, int64_t kept) {
  switch (kind) {
    case INT8: return static_cast<int8_t>(values[(kept / 4) * 32 + row * 4 + kept % 4]);
    case INT4: {
      const uint8_t both = values[(kept / 8) * 32 + row * 4 + kept % 4];
      return static_cast<int>(kept / 4 % 2 ? both >> 4 : both & 15) - 8;
    }
    case E4M3: {
      const int32_t wide = static_cast<int32_t>(static_cast<int8_t>(values[kept * ROWS + row]));
      const uint32_t bits = (static_cast<uint32_t>(wide) << 20) & 0x87F00000u;
      float found;
      std::memcpy(&found, &bits, 4);
      return found * 0x1p120f;
    }
    case FLOAT32: {
      float found;
      std::memcpy(&found, values + (kept * ROWS + row) * 4, 4);
      return found;
    }
    default: {
      uint16_t bits;
      std::memcpy(&bits, values + (kept * ROWS + row) * 2, 2);
      if (kind == FLOAT16) return half_to_float(bits);
      const uint32_t wide = static_cast<uint32_t>(bits) << 16;
      float found;
      std::memcpy(&found, &wide, 4);
      return found;
    }
  }
}

// Half of the power of two that E4M3's shifted bits lack: inputs and scales take it, so that no product or sum leaves
// float32's range. Without AVX2 values are whole (`value_of`).
float half_factor(int64_t kind) {
#ifdef HWPQ_AVX2
  if (kind == E4M3) return 0x1p60f;
#endif
  return 1.0f;
}

struct Inputs {
  int64_t count, words;
  std::vector<float> plain;      // (count, words * 32), of float kinds
  std::vector<int8_t> rounded;   // (count, words * 32), of integer kinds
  std::vector<float> scale;      // (count, words)
};

Inputs prepare(const float* x, int64_t count, int64_t columns, int64_t words, int64_t kind) {
  Inputs made{count, words, {}, {}, {}};
  if (!whole(kind)) {
    made.plain.assign(count * words * WORD, 0.0f);
    for (int64_t row = 0; row < count; row++)
      for (int64_t j = 0; j < columns; j++) made.plain[row * words * WORD + j] = x[row * columns + j] * half_factor(kind);
    return made;
  }
  made.rounded.assign(count * words * WORD, 0);
  made.scale.resize(count * words);
  for (int64_t row = 0; row < count; row++) {
    for (int64_t word = 0; word < words; word++) {
      const float* given = x + row * columns + word * WORD;
      const int64_t size = std::min(WORD, columns - word * WORD);
      float largest = 0.0f;
      for (int64_t j = 0; j < size; j++) largest = std::max(largest, std::fabs(given[j]));
      // A NaN among the inputs makes the whole word NaN: max passes it over, so the sum is asked.
      float sum = 0.0f;
      for (int64_t j = 0; j < size; j++) sum += given[j] * 0.0f;
      const float scale = largest / 127.0f + sum;
      made.scale[row * words + word] = scale;
      const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
      int8_t* target = &made.rounded[(row * words + word) * WORD];
      for (int64_t j = 0; j < size; j++) target[j] = static_cast<int8_t>(std::nearbyintf(given[j] * inverse));
    }
  }
  return made;
}

#ifdef HWPQ_AVX2

inline __m256i dot(__m256i sum, __m256i value, __m256i picked) {
  const __m256i size = _mm256_abs_epi8(value), along = _mm256_sign_epi8(picked, value);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return _mm256_dpbusd_epi32(sum, size, along);
#elif defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(sum, size, along);
#else
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(size, along), _mm256_set1_epi16(1)));
#endif
}

// Eight rows of integers times `N` inputs, over `words` words: adds into `total` without the rows' scale.
template <int N, bool NIBBLES>
void add_integers(const uint8_t* values, const uint8_t* places, const int8_t* x, const float* x_scale, int64_t stride,
                  int64_t scale_stride, int64_t words, __m256* total) {
  const __m256i three = _mm256_set1_epi8(3), nibble = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8);
  const __m256i low = _mm256_set1_epi32(0x04040000), high = _mm256_set1_epi32(0x0C0C0808);
  for (int64_t word = 0; word < words; word++) {
    const __m256i place = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(places + word * PLACES));
    const __m256i* stored = reinterpret_cast<const __m256i*>(values + word * (NIBBLES ? 64 : 128));
    __m256i value[4];
    if (NIBBLES) {
      for (int half = 0; half < 2; half++) {
        const __m256i both = _mm256_loadu_si256(stored + half);
        value[2 * half] = _mm256_sub_epi8(_mm256_and_si256(both, nibble), eight);
        value[2 * half + 1] = _mm256_sub_epi8(_mm256_and_si256(_mm256_srli_epi16(both, 4), nibble), eight);
      }
    } else {
      for (int part = 0; part < 4; part++) value[part] = _mm256_loadu_si256(stored + part);
    }
    const __m256i chosen[4] = {
        _mm256_or_si256(_mm256_and_si256(place, three), low),
        _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(place, 2), three), high),
        _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(place, 4), three), low),
        _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(place, 6), three), high),
    };
    for (int row = 0; row < N; row++) {
      const int8_t* given = x + row * stride + word * WORD;
      __m256i sum = _mm256_setzero_si256();
      for (int half = 0; half < 2; half++) {
        const __m256i inputs =
            _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(given + 16 * half)));
        for (int part = 2 * half; part < 2 * half + 2; part++)
          sum = dot(sum, value[part], _mm256_shuffle_epi8(inputs, chosen[part]));
      }
      const __m256 factor = _mm256_set1_ps(x_scale[row * scale_stride + word]);
      total[row] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), factor, total[row]);
    }
  }
}

template <int KIND>
inline __m256 load_values(const uint8_t* values) {
  if (KIND == FLOAT32) return _mm256_loadu_ps(reinterpret_cast<const float*>(values));
  if (KIND == E4M3) {
    const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values)));
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_slli_epi32(wide, 20), _mm256_set1_epi32(0x87F00000)));
  }
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  if (KIND == FLOAT16) return _mm256_cvtph_ps(bits);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// Eight rows of floats times `N` inputs.
template <int N, int KIND>
void add_floats(const uint8_t* values, const uint8_t* places, const float* x, int64_t stride, int64_t words,
                __m256* total) {
  constexpr int SIZE = KIND == FLOAT32 ? 4 : KIND == E4M3 ? 1 : 2;
  for (int64_t word = 0; word < words; word++) {
    __m256i place = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(places + word * PLACES));
    const uint8_t* stored = values + word * ROWS * KEPT * SIZE;
    for (int group = 0; group < WORD / 4; group++) {
      const __m256 first = load_values<KIND>(stored + (2 * group) * ROWS * SIZE);
      const __m256 second = load_values<KIND>(stored + (2 * group + 1) * ROWS * SIZE);
      const __m256i after = _mm256_srli_epi32(place, 2);
      for (int row = 0; row < N; row++) {
        const __m256 quad =
            _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x + row * stride + word * WORD + 4 * group));
        total[row] = _mm256_fmadd_ps(first, _mm256_permutevar_ps(quad, place), total[row]);
        total[row] = _mm256_fmadd_ps(second, _mm256_permutevar_ps(quad, after), total[row]);
      }
      place = _mm256_srli_epi32(place, 4);
    }
  }
}

template <int N>
void add_words(int64_t kind, const uint8_t* values, const uint8_t* places, const Inputs& x, int64_t row, int64_t first,
               int64_t words, __m256* total) {
  const int64_t stride = x.words * WORD;
  const float* plain = x.plain.data() + row * stride + first * WORD;
  const int8_t* rounded = x.rounded.data() + row * stride + first * WORD;
  const float* scale = x.scale.data() + row * x.words + first;
  switch (kind) {
    case INT8: return add_integers<N, false>(values, places, rounded, scale, stride, x.words, words, total);
    case INT4: return add_integers<N, true>(values, places, rounded, scale, stride, x.words, words, total);
    case E4M3: return add_floats<N, E4M3>(values, places, plain, stride, words, total);
    case BFLOAT16: return add_floats<N, BFLOAT16>(values, places, plain, stride, words, total);
    case FLOAT16: return add_floats<N, FLOAT16>(values, places, plain, stride, words, total);
    default: return add_floats<N, FLOAT32>(values, places, plain, stride, words, total);
  }
}

// Rows `8 block` to `8 block + 7` for `N` inputs from `row` on.
template <int N>
void block_of(int64_t kind, const uint8_t* values, const uint8_t* places, const float* scale, int64_t groups,
              const Inputs& x, int64_t row, int64_t block, float* result, int64_t width) {
  const int64_t words = x.words / groups;
  __m256 sums[N];
  for (int n = 0; n < N; n++) sums[n] = _mm256_setzero_ps();
  for (int64_t group = 0; group < groups; group++) {
    __m256 total[N];
    for (int n = 0; n < N; n++) total[n] = _mm256_setzero_ps();
    const int64_t at = block * x.words + group * words;
    add_words<N>(kind, values + at * bytes_of(kind), places + at * PLACES, x, row, group * words, words, total);
    __m256 factor = _mm256_loadu_ps(scale + (block * groups + group) * ROWS);
    factor = _mm256_mul_ps(factor, _mm256_set1_ps(half_factor(kind)));
    for (int n = 0; n < N; n++) sums[n] = _mm256_fmadd_ps(total[n], factor, sums[n]);
  }
  for (int n = 0; n < N; n++) _mm256_storeu_ps(result + (row + n) * width + block * ROWS, sums[n]);
}

#else

template <int N>
void block_of(int64_t kind, const uint8_t* values, const uint8_t* places, const float* scale, int64_t groups,
              const Inputs& x, int64_t row, int64_t block, float* result, int64_t width) {
  const int64_t words = x.words / groups;
  for (int n = 0; n < N; n++) {
    for (int64_t lane = 0; lane < ROWS; lane++) {
      float sum = 0.0f;
      for (int64_t group = 0; group < groups; group++) {
        float total = 0.0f;
        for (int64_t word = group * words; word < (group + 1) * words; word++) {
          const int64_t at = block * x.words + word;
          float part = 0.0f;
          for (int64_t kept = 0; kept < KEPT; kept++) {
            const int place = place_of(places + at * PLACES, whole(kind), lane, kept);
            const int64_t column = ((row + n) * x.words + word) * WORD + 4 * (kept / 2) + place;
            const float given = whole(kind) ? static_cast<float>(x.rounded[column]) : x.plain[column];
            part += value_of(values + at * bytes_of(kind), kind, lane, kept) * given;
          }
          total += whole(kind) ? part * x.scale[(row + n) * x.words + word] : part;
        }
        sum += total * scale[(block * groups + group) * ROWS + lane];
      }
      result[(row + n) * width + block * ROWS + lane] = sum;
    }
  }
}

#endif

void check(const at::Tensor& values, const at::Tensor& places, const at::Tensor& scale, int64_t kind) {
  TORCH_CHECK(values.scalar_type() == at::kByte && places.scalar_type() == at::kByte && scale.scalar_type() == at::kFloat,
              "packed_linear: values and places are bytes, scales float32");
  TORCH_CHECK(values.is_contiguous() && places.is_contiguous() && scale.is_contiguous(), "packed_linear: not contiguous");
  TORCH_CHECK(kind >= FLOAT32 && kind <= INT4, "packed_linear: no such kind of values");
  TORCH_CHECK(places.dim() == 3 && values.dim() == 3 && scale.dim() == 3 && places.size(2) == PLACES &&
                  values.size(0) == places.size(0) && values.size(1) == places.size(1) &&
                  values.size(2) == bytes_of(kind) && scale.size(0) == places.size(0) && scale.size(2) == ROWS &&
                  scale.size(1) > 0 && places.size(1) % scale.size(1) == 0,
              "packed_linear: values, places and scales do not belong together");
}

// Rows `first` to `last - 1` of the dense weight; the kind is known when this is compiled.
template <int KIND>
void unpack_rows(const uint8_t* values, const uint8_t* places, const float* scale, int64_t words, int64_t groups,
                 int64_t columns, int64_t first, int64_t last, float* target) {
  for (int64_t row = first; row < last; row++) {
    const int64_t block = row / ROWS, lane = row % ROWS;
    for (int64_t word = 0; word < words; word++) {
      const int64_t at = block * words + word, size = std::min(WORD, columns - word * WORD);
      if (size <= 0) break;
      const float factor = scale[(block * groups + word / (words / groups)) * ROWS + lane];
      float dense[WORD] = {};
      for (int64_t kept = 0; kept < KEPT; kept++) {
        const int place = place_of(places + at * PLACES, whole(KIND), lane, kept);
        dense[4 * (kept / 2) + place] += value_of(values + at * bytes_of(KIND), KIND, lane, kept) * factor;
      }
      std::copy_n(dense, size, target + row * columns + word * WORD);
    }
  }
}

// (rows, columns) float32, zeros in their places.
at::Tensor unpack(const at::Tensor& values, const at::Tensor& places, const at::Tensor& scale, int64_t kind,
                  int64_t rows, int64_t columns) {
  check(values, places, scale, kind);
  const int64_t words = places.size(1), groups = scale.size(1);
  TORCH_CHECK((columns + WORD - 1) / WORD == words && (rows + ROWS - 1) / ROWS == places.size(0),
              "packed_linear: another shape");
  at::Tensor dense = at::empty({rows, columns}, scale.options());
  float* target = dense.data_ptr<float>();
  const uint8_t *v = values.data_ptr<uint8_t>(), *p = places.data_ptr<uint8_t>();
  const float* s = scale.data_ptr<float>();
  constexpr decltype(&unpack_rows<INT8>) by_kind[] = {unpack_rows<FLOAT32>, unpack_rows<BFLOAT16>, unpack_rows<FLOAT16>,
                                                      unpack_rows<E4M3>,    unpack_rows<INT8>,     unpack_rows<INT4>};
  at::parallel_for(0, rows, std::max<int64_t>(1, SMALLEST_SHARE / std::max<int64_t>(1, words)),
                   [&](int64_t first, int64_t last) { by_kind[kind](v, p, s, words, groups, columns, first, last, target); });
  return dense;
}

at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& places, const at::Tensor& scale,
                         const c10::optional<at::Tensor>& bias, int64_t kind, int64_t rows, int64_t few) {
  check(values, places, scale, kind);
  TORCH_CHECK(x.dim() > 0, "packed_linear: inputs without a dimension");
  TORCH_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == rows && at::isFloatingType(bias->scalar_type())),
              "packed_linear: another bias than one float for each output");
  if (few < 0) few = most_rows(kind);
  const int64_t columns = x.size(-1), words = places.size(1), blocks = places.size(0), groups = scale.size(1);
  TORCH_CHECK((columns + WORD - 1) / WORD == words && (rows + ROWS - 1) / ROWS == blocks,
              "packed_linear: inputs or outputs of another width");
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = rows;
  const int64_t count = columns ? x.numel() / columns : 0;
  if (count > few) {
    const at::Tensor dense = unpack(values, places, scale, kind, rows, columns).to(multiplied_in(x.scalar_type()));
    const at::Tensor wide = x.to(dense.scalar_type());
    const at::Tensor product =
        bias.has_value() ? at::linear(wide, dense, bias->to(dense.scalar_type())) : at::linear(wide, dense);
    return product.to(x.scalar_type());
  }
  const int64_t width = blocks * ROWS;
  // Activations are read and written in their own dtype here: torch's conversions would cost as much as a small layer.
  const at::Tensor contiguous = x.contiguous();
  std::vector<float> given(count * columns), result(count * width);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "packed_linear", [&] {
    std::copy_n(contiguous.const_data_ptr<scalar_t>(), count * columns, given.data());
  });
  const Inputs inputs = prepare(given.data(), count, columns, words, kind);
  float* target = result.data();
  const uint8_t *v = values.data_ptr<uint8_t>(), *p = places.data_ptr<uint8_t>();
  const float* s = scale.data_ptr<float>();
  at::parallel_for(0, blocks, std::max<int64_t>(1, SMALLEST_SHARE / std::max<int64_t>(1, words * count)),
                   [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block++) {
      int64_t row = 0;
      for (; row + 4 <= count; row += 4) block_of<4>(kind, v, p, s, groups, inputs, row, block, target, width);
      if (row + 2 <= count) block_of<2>(kind, v, p, s, groups, inputs, row, block, target, width), row += 2;
      if (row < count) block_of<1>(kind, v, p, s, groups, inputs, row, block, target, width);
    }
  });
  if (bias.has_value()) {
    const at::Tensor wide = bias->to(at::kFloat).contiguous();
    const float* added = wide.const_data_ptr<float>();
    for (int64_t row = 0; row < count; row++)
      for (int64_t j = 0; j < rows; j++) target[row * width + j] += added[j];
  }
  at::Tensor found = at::empty(shape, x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "packed_linear", [&] {
    scalar_t* out = found.mutable_data_ptr<scalar_t>();
    for (int64_t row = 0; row < count; row++)
      for (int64_t j = 0; j < rows; j++) out[row * rows + j] = static_cast<scalar_t>(target[row * width + j]);
  });
  return found;
}

// Above the kernel, where it is known whether gradients are wanted: there are none.
at::Tensor for_inference(const at::Tensor& x, const at::Tensor& values, const at::Tensor& places, const at::Tensor& scale,
                         const c10::optional<at::Tensor>& bias, int64_t kind, int64_t rows, int64_t few) {
  const bool wanted = x.requires_grad() || scale.requires_grad() || (bias.has_value() && bias->requires_grad());
  TORCH_CHECK(!(wanted && at::GradMode::is_enabled()), "packed_linear: an input wants gradients, and this is for inference only");
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("hwpq_native::packed_linear", "").typed<decltype(packed_linear)>();
  const at::AutoDispatchBelowAutograd below;
  return op.call(x, values, places, scale, bias, kind, rows, few);
}

}  // namespace

TORCH_LIBRARY(hwpq_native, library) {
  library.def("packed_linear(Tensor x, Tensor values, Tensor places, Tensor scale, Tensor? bias, int kind, int rows, int few=-1) -> Tensor");
  library.def("unpack(Tensor values, Tensor places, Tensor scale, int kind, int rows, int columns) -> Tensor");
}

TORCH_LIBRARY_IMPL(hwpq_native, CPU, library) {
  library.impl("packed_linear", &packed_linear);
  library.impl("unpack", &unpack);
}

TORCH_LIBRARY_IMPL(hwpq_native, Autograd, library) { library.impl("packed_linear", &for_inference); }
