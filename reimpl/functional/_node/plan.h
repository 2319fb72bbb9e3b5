// What Python writes down for the node (plan.py), and how its kernels are called.

#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <bit>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

namespace reimpl {

using at::Tensor;
using Kernel = void (*)(void*);
using Words = std::vector<int64_t>;
using Pairs = std::vector<std::pair<int64_t, int64_t>>;
using Tensors = c10::SmallVector<Tensor, 12>;
using Table = c10::SmallVector<int64_t, 256>;

// GOMP_parallel of PyTorch's own OpenMP runtime.
inline void (*fork_call)(Kernel, void*, unsigned, unsigned) = nullptr;

struct Layout {
  int dtype = -1;  // where there is no tensor
  Words sizes, strides;

  static Layout of(const Tensor& t) { return {static_cast<int>(t.scalar_type()), t.sizes().vec(), t.strides().vec()}; }
  bool fits(const Tensor& t) const {
    if (!t.defined() || dtype < 0) return !t.defined() && dtype < 0;
    return static_cast<int>(t.scalar_type()) == dtype && t.sizes() == sizes && t.strides() == strides;
  }
  Tensor empty() const {
    return Tensor(at::detail::empty_strided_cpu(sizes, strides, static_cast<at::ScalarType>(dtype)));
  }
};

struct Step {
  std::vector<std::tuple<int64_t, int64_t, int64_t>> launches;  // a kernel, its table's place, its threads
  Words words;
  // Places of words, with: the number of a tensor, the place of another word, a place in the room, the number of a
  // float, and for work without a layout 0 for the count of numbers and 1 for how many of them a thread takes at once.
  Pairs addresses, inside, rooms, numbers, shares;
  int64_t room = 0, grain = 0;  // words that nobody clears; the fewest numbers that another thread is woken for

  // The table after the kernels have answered in it.
  Table run(const Tensors& tensors, const std::vector<double>& floats, const Pairs& given = {}) const {
    Table table(words.begin(), words.end());
    const auto start = reinterpret_cast<int64_t>(table.data());
    const std::unique_ptr<int64_t[]> space(room > 0 ? new int64_t[room] : nullptr);
    for (const auto& [at, place] : inside) table[at] = start + 8 * place;
    for (const auto& [at, place] : rooms) table[at] = reinterpret_cast<int64_t>(space.get() + place);
    for (const auto& [at, number] : addresses) table[at] = reinterpret_cast<int64_t>(tensors[number].const_data_ptr());
    for (const auto& [at, number] : numbers) table[at] = std::bit_cast<int64_t>(floats[number]);
    for (const auto& [at, word] : given) table[at] = word;
    int64_t most = INT64_MAX;
    if (grain > 0) {
      const int64_t count = tensors[0].numel();
      most = std::clamp<int64_t>(count / grain, 1, at::get_num_threads());
      // whole registers
      const int64_t block = ((count + most - 1) / most + 15) / 16 * 16;
      for (const auto& [at, what] : shares) table[at] = what == 0 ? count : block;
    }
    for (const auto& [kernel, place, threads] : launches) {
      const auto function = reinterpret_cast<Kernel>(kernel);
      const auto used = std::min(most, threads);
      if (used > 1 && fork_call != nullptr) {
        fork_call(function, table.data() + place, static_cast<unsigned>(used), 0);
      } else {
        function(table.data() + place);
      }
    }
    return table;
  }
};

struct Plan {
  int64_t threads = 0;          // PyTorch's number of threads that it was made for
  std::vector<Layout> layouts;  // of the arguments, then of the outputs
  size_t arguments = 0;
  Step forward, backward;              // backward's tensors: what is saved, the gradient, the results
  std::vector<size_t> differentiable;  // the arguments that the results are the gradients of
  std::vector<size_t> changed;         // the arguments that the forward pass writes to
  std::vector<size_t> saved;
  Pairs carried;        // doubles, from a word of the forward pass to one of the backward pass
  int64_t refusal = 0;  // the forward pass's word that says that the numbers will not do
  uint64_t wanted = 0;  // the differentiable arguments as bits

  // Number by number: any dense layout of the first tensor's dtype is done, and all tensors are laid out alike.
  bool everywhere() const { return forward.grain > 0; }

  // Whether the plan does such tensors, of which those in the bits given want gradients.
  bool fits(const Tensors& tensors, uint64_t wanting) const {
    if (tensors.size() != arguments || (wanting != 0 && wanting != wanted)) return false;
    if (everywhere()) {
      const auto& t = tensors[0];
      return t.defined() && static_cast<int>(t.scalar_type()) == layouts[0].dtype && t.numel() > 0 &&
          t.unsafeGetTensorImpl()->is_non_overlapping_and_dense();
    }
    if (threads != at::get_num_threads()) return false;
    for (size_t i = 0; i < arguments; ++i) {
      if (!layouts[i].fits(tensors[i])) return false;
    }
    return true;
  }
};

}  // namespace reimpl
