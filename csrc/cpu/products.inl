// The search for singular vectors reads W once a step: both products of a few rows while they are in cache. Included
// after rows.inl, inside the same anonymous namespace. Nothing here may call a template of the standard library.

// Rows of float32 and float16, widened into the order of bfloat16's lanes: a weight and its copy in a wider dtype have
// the same products, bit for bit. That is what float32 is here for: torch is as fast on it, 1.3 to 2 times slower on
// bfloat16 (1 thread, AVX2 and AVX-512; three times faster than registers of 16 bytes).
struct OrderedFloat {
  float value;
};
struct OrderedHalf {
  Half value;
};

template <>
struct Lanes<OrderedFloat> : Lanes<BFloat16> {
  static void load(const OrderedFloat* p, Reg& low, Reg& high) { load_basis(&p->value, low, high); }
  static void load_part(const OrderedFloat* p, int64_t n, Reg& low, Reg& high) {
    load_basis_part(&p->value, n, low, high);
  }
};

template <>
struct Lanes<OrderedHalf> : Lanes<BFloat16> {
  static void order(Reg& low, Reg& high) {
    float row[2 * kWidth];
    Lanes<float>::store(row, low, high);
    load_basis(row, low, high);
  }
  static void load(const OrderedHalf* p, Reg& low, Reg& high) {
    Lanes<Half>::load(&p->value, low, high);
    order(low, high);
  }
  static void load_part(const OrderedHalf* p, int64_t n, Reg& low, Reg& high) {
    Lanes<Half>::load_part(&p->value, n, low, high);
    order(low, high);
  }
};

// S += Y^T W for rows [begin, end) and vectors [k, k + V), the sums in the order of lanes that load gives W.
template <class T, int V>
inline void add_back(const ProductsJob& job, int64_t begin, int64_t end, int64_t k) {
  using L = Lanes<T>;
  using Reg = typename L::Reg;
  constexpr int kStep = 2 * L::kWidth;
  for (int64_t d = 0; d < job.width; d += kStep) {
    Reg low[V], high[V], w_low, w_high;
    float* sums = job.sums + k * job.padded_width + d;
    TINYLORA_UNROLL
    for (int j = 0; j < V; ++j) {
      __builtin_memcpy(&low[j], sums + j * job.padded_width, sizeof(Reg));
      __builtin_memcpy(&high[j], sums + j * job.padded_width + L::kWidth, sizeof(Reg));
    }
    const int64_t part = job.width - d;
    for (int64_t n = begin; n < end; ++n) {
      const T* w = static_cast<const T*>(job.rows) + n * job.stride + d;
      if (k == 0) __builtin_prefetch(w + kProductsTile * job.stride);  // the next tile comes from memory
      part >= kStep ? L::load(w, w_low, w_high) : L::load_part(w, part, w_low, w_high);
      TINYLORA_UNROLL
      for (int j = 0; j < V; ++j) {
        const Reg y = L::fill(job.y[n * job.vectors + k + j]);
        low[j] = L::multiply_add(y, w_low, low[j]);
        high[j] = L::multiply_add(y, w_high, high[j]);
      }
    }
    TINYLORA_UNROLL
    for (int j = 0; j < V; ++j) {
      __builtin_memcpy(sums + j * job.padded_width, &low[j], sizeof(Reg));
      __builtin_memcpy(sums + j * job.padded_width + L::kWidth, &high[j], sizeof(Reg));
    }
  }
}

// Y = W X^T and S += Y^T W for rows of W [N, D], float32 sums in the order of the rows.
template <class T>
void products(const ProductsJob& job) {
  using L = Lanes<T>;
  using Reg = typename L::Reg;
  constexpr int kRows = kRowsTogether<4>, kStep = 2 * L::kWidth;
  static_assert(kProductsStep % kStep == 0, "the sums are padded to whole steps of every instruction set");
  for (int64_t tile = 0; tile < job.count; tile += kProductsTile) {
    const int64_t end = tile + kProductsTile < job.count ? tile + kProductsTile : job.count;
    // Y = W X^T, four vectors at a time: rows x vectors sums fill the registers
    for (int64_t k = 0; k < job.vectors; k += 4) {
      int64_t n = tile;
      const auto project_rows = [&](auto& s) {
        constexpr int rows = sizeof(s) / sizeof(s[0]);
        const T* w = static_cast<const T*>(job.rows) + n * job.stride;
        project<T, 4, rows>(w, job.stride, job.x + k * job.width, job.width, job.width, s);
        for (int i = 0; i < rows; ++i, ++n) {
          for (int j = 0; j < 4; ++j) job.y[n * job.vectors + k + j] = s[i][j];
        }
      };
      float together[kRows][4], alone[1][4];
      while (n + kRows <= end) project_rows(together);
      while (n < end) project_rows(alone);
    }
    int64_t k = 0;
    for (; kAccumulators >= 16 && k + 8 <= job.vectors; k += 8) add_back<T, 8>(job, tile, end, k);
    for (; k < job.vectors; k += 4) add_back<T, 4>(job, tile, end, k);
  }
  // From the order of lanes to that of columns: what load_basis does to a row of positions is what load did to W.
  float positions[kStep], lanes[kStep];
  for (int i = 0; i < kStep; ++i) positions[i] = float(i);
  Reg low, high;
  L::load_basis(positions, low, high);
  __builtin_memcpy(lanes, &low, sizeof(Reg));
  __builtin_memcpy(lanes + L::kWidth, &high, sizeof(Reg));
  for (int64_t k = 0; k < job.vectors; ++k) {
    for (int64_t d = 0; d < job.padded_width; d += kStep) {
      float* sums = job.sums + k * job.padded_width + d;
      float step[kStep];
      __builtin_memcpy(step, sums, sizeof step);
      for (int i = 0; i < kStep; ++i) sums[int(lanes[i])] = step[i];
    }
  }
}
