// Row and column logsumexp of scale · z xᵀ on the GPU, the scores formed tile by tile and never stored.
//
// The kernels are in …_tile.h, …_forward.h and …_backward.h (tensor cores: float32, bfloat16, float16) and in …_fma.h
// (float64). One pass over the scores gives both directions; backward forms them again, once for either side. Where
// there is too little work for all of the GPU, it is cut further: the parts meet in a second kernel, in a fixed order.
//
// The reference is in python/ncpvae/ops/reference.py.
#include <tuple>

#include "similarity_logsumexp_backward.h"
#include "similarity_logsumexp_fma.h"
#include "similarity_logsumexp_forward.h"

namespace ncpvae::cuda {
namespace {

// The sum of `count` parts, by one warp.
template <typename T>
__global__ void __launch_bounds__(kWarp) sum_parts(const double* parts, int64_t count, T* sum) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < count; i += kWarp) total += parts[i];
  total = warp_sum(total);
  if (threadIdx.x == 0) *sum = static_cast<T>(total);
}

// ---- host ----------------------------------------------------------------------------------------------------

void check(const char* op, const Tensor& z, const Tensor& x, const Tensor& scale) {
  check_matrix(op, "z", z);
  check_matrix(op, "x", x, 1);
  check_dtype(op, "x", x, z.scalar_type());
  check_shape(op, "x", x, {x.size(0), z.size(1)});
  check_shape(op, "scale", scale, {});
}

// The forward kernel's part of the work: `run` launches it with tiles of `tile` scores.
template <typename T, typename F>
std::tuple<Tensor, Tensor> forward(const Launcher& launcher, const Tensor& z, const Tensor& x, int tile, F&& run) {
  const int64_t rows = z.size(0), columns = x.size(0);
  const ScalarType type = accumulation_type(z.scalar_type());
  const Groups groups = choose_groups(rows, columns, tile);
  const Tensor lse_z = new_tensor(z, {rows}, type), lse_x = new_tensor(z, {columns}, type);
  const Tensor row_partials = new_tensor(z, {rows, groups.column_groups, 2}, type);
  const Tensor column_partials = new_tensor(z, {columns, groups.row_groups, 2}, type);
  run(groups, mutable_data<Partial<T>>(row_partials), mutable_data<Partial<T>>(column_partials));
  launcher.launch(merge_partials<T>, ceil_div(rows, kTileWarps), kTileThreads, data<Partial<T>>(row_partials), rows,
                  groups.column_groups, mutable_data<T>(lse_z));
  launcher.launch(merge_partials<T>, ceil_div(columns, kTileWarps), kTileThreads, data<Partial<T>>(column_partials),
                  columns, groups.row_groups, mutable_data<T>(lse_x));
  return {lse_z, lse_x};
}

std::tuple<Tensor, Tensor> similarity_logsumexp(const Tensor& z, const Tensor& x, const Tensor& scale) {
  const char* op = "similarity_logsumexp";
  check(op, z, x, scale);
  const Launcher launcher(op, z);
  const Tensor dense_z = as_contiguous(z), dense_x = as_contiguous(x);
  const Tensor wide_scale = as_type(scale, accumulation_type(z.scalar_type()));
  std::tuple<Tensor, Tensor> result{z, x};
  dispatch_floating(op, "z", z.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_same_v<T, double>) {
      result = forward<double>(launcher, z, x, kTile<double>, [&](const Groups& groups, auto* rows, auto* columns) {
        launcher.launch(both_directions_fma<double>, groups.row_groups * groups.column_groups, kTileThreads,
                        matrix<double>(dense_z), matrix<double>(dense_x), data<double>(wide_scale), groups, rows,
                        columns);
      });
    } else {
      result = forward<float>(launcher, z, x, kBlock, [&](const Groups& groups, auto* rows, auto* columns) {
        launcher.launch_with_memory(both_directions_mma<T>, groups.row_groups * groups.column_groups, kBlockThreads,
                                    sizeof(ForwardMemory), source<T>(dense_z), source<T>(dense_x),
                                    data<float>(wide_scale), groups, rows, columns);
      });
    }
  });
  return result;
}

// Gradients in the type that the op computes in: of one side after the other, each as the sum of its splits' parts.
// `run` launches the kernel for `side` 0 (z) or 1 (x).
template <typename T, typename F>
std::tuple<Tensor, Tensor, Tensor> backward(const Launcher& launcher, const Tensor& z, const Tensor& x, int tile,
                                            F&& run) {
  const ScalarType type = accumulation_type(z.scalar_type());
  const Tensor gradients[] = {new_tensor(z, {z.size(0), z.size(1)}, type), new_tensor(x, {x.size(0), x.size(1)}, type)};
  const Tensor dscale = new_tensor(z, {}, type);
  for (int side = 0; side < 2; ++side) {
    const Tensor& out = gradients[side];
    const Shares shares = share(out.size(0), gradients[1 - side].size(0), tile);
    const bool one = shares.splits == 1;  // the part is the gradient
    const Tensor parts = one ? out : new_tensor(z, {shares.splits, out.size(0), out.size(1)}, type);
    const Tensor scale_parts = new_tensor(z, {side == 0 ? shares.blocks() : 0}, ScalarType::Double);
    run(side, shares, mutable_data<T>(parts), side == 0 ? mutable_data<double>(scale_parts) : nullptr);
    if (!one) {
      launcher.launch(sum_splits<T>, ceil_div(out.numel(), kTileThreads), kTileThreads, data<T>(parts), shares.splits,
                      out.numel(), mutable_data<T>(out));
    }
    if (side == 0) {
      launcher.launch(sum_parts<T>, 1, kWarp, data<double>(scale_parts), shares.blocks(), mutable_data<T>(dscale));
    }
  }
  return {gradients[0], gradients[1], dscale};
}

std::tuple<Tensor, Tensor, Tensor> similarity_logsumexp_backward(const Tensor& grad_z, const Tensor& grad_x,
                                                                 const Tensor& z, const Tensor& x, const Tensor& scale,
                                                                 const Tensor& lse_z, const Tensor& lse_x) {
  const char* op = "similarity_logsumexp_backward";
  check(op, z, x, scale);
  check_shape(op, "grad_z", grad_z, {z.size(0)});
  check_shape(op, "grad_x", grad_x, {x.size(0)});
  check_shape(op, "lse_z", lse_z, {z.size(0)});
  check_shape(op, "lse_x", lse_x, {x.size(0)});
  const Launcher launcher(op, z);
  const ScalarType type = accumulation_type(z.scalar_type());
  const Tensor dense_z = as_contiguous(z), dense_x = as_contiguous(x), wide_scale = as_type(scale, type);
  const Tensor gz = as_contiguous(as_type(grad_z, type)), gx = as_contiguous(as_type(grad_x, type));
  const Tensor lz = as_contiguous(as_type(lse_z, type)), lx = as_contiguous(as_type(lse_x, type));
  std::tuple<Tensor, Tensor, Tensor> result{z, x, scale};
  dispatch_floating(op, "z", z.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_same_v<T, double>) {
      const Axis<T> sides[] = {{matrix<T>(dense_z), data<T>(gz), data<T>(lz)},
                               {matrix<T>(dense_x), data<T>(gx), data<T>(lx)}};
      const auto run = [&](int side, const Shares& shares, T* parts, double* scale_parts) {
        launcher.launch(backward_side_fma<T>, shares.blocks(), kTileThreads, sides[side], sides[1 - side],
                        data<T>(wide_scale), shares, parts, scale_parts);
      };
      result = backward<T>(launcher, z, x, kTile<T>, run);
    } else {
      const Side<T> sides[] = {{source<T>(dense_z), data<float>(gz), data<float>(lz)},
                               {source<T>(dense_x), data<float>(gx), data<float>(lx)}};
      const Tensor boost = new_tensor(z, {}, type);
      if (kBoosted<T>) {
        launcher.launch(choose_boost, 1, kBlockThreads, data<float>(gz), z.size(0), data<float>(gx), x.size(0),
                        mutable_data<float>(boost));
      }
      // Only float32 tells the two orders of a product apart.
      const auto other = backward_side_mma<T, std::is_same_v<T, float>>;
      const auto run = [&](int side, const Shares& shares, float* parts, double* scale_parts) {
        launcher.launch_with_memory(side == 0 ? backward_side_mma<T, false> : other, shares.blocks(), kBlockThreads,
                                    sizeof(BackwardMemory<T>), sides[side], sides[1 - side], data<float>(wide_scale),
                                    data<float>(boost), shares, parts, scale_parts);
      };
      result = backward<float>(launcher, z, x, kBlock, run);
    }
  });
  const auto& [dz, dx, dscale] = result;
  return {as_type(dz, z.scalar_type()), as_type(dx, x.scalar_type()), as_type(dscale, scale.scalar_type())};
}

}  // namespace
}  // namespace ncpvae::cuda

STABLE_TORCH_LIBRARY_IMPL(ncpvae, CUDA, m) {
  m.impl("similarity_logsumexp", TORCH_BOX(&ncpvae::cuda::similarity_logsumexp));
  m.impl("similarity_logsumexp_backward", TORCH_BOX(&ncpvae::cuda::similarity_logsumexp_backward));
}
