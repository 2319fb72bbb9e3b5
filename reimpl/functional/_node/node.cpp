// One autograd node for every layer whose two passes are compiled kernels, without Python in either.
//
// A *step* is a kernel with a table of 64-bit words to call it with: literals, addresses of tensors, and addresses
// inside the table itself. A *plan* is what a layer does for tensors of given layouts: a step forward, a step backward,
// and what is kept in between. A *site* is a layer with its options: the plans met so far, and a Python function of the
// same gradient out of differentiable operators. Python writes all of them (plan.py); here they are run.
//
// `call` answers None wherever something else is wanted than plain float32 numbers and their gradient: other layouts,
// subclasses, `vmap`, forward mode, dispatch modes, tracing. Python's own way then takes over. So it does in a backward
// pass that wants more than numbers: one that is differentiated, or traced by compiled autograd.

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/utils/pybind.h>

#include <bit>

namespace py = pybind11;
using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::IValuePacker;
using torch::dynamo::autograd::SwapSavedVariables;

namespace {

using Kernel = void (*)(void*);
using Words = std::vector<int64_t>;
using Pairs = std::vector<std::pair<int64_t, int64_t>>;
// A std::shared_ptr or, in later releases, a c10::intrusive_ptr.
using NodePointer = decltype(torch::autograd::Edge::function);

constexpr const char* kSite = "reimpl.site";
constexpr size_t kMostTensors = 8;
constexpr size_t kMostPlans = 32;

// Whether the kernels are switched on, and GOMP_parallel of PyTorch's own OpenMP runtime.
bool enabled = false;
void (*fork_call)(Kernel, void*, unsigned, unsigned) = nullptr;

using Tensors = c10::SmallVector<Tensor, kMostTensors>;
using Numbers = c10::SmallVector<at::IValue, 2>;

struct Layout {
  int dtype;  // -1 where there is no tensor
  Words sizes, strides;

  bool fits(const Tensor& t) const {
    if (!t.defined() || dtype < 0) return !t.defined() && dtype < 0;
    return static_cast<int>(t.scalar_type()) == dtype && t.sizes() == sizes && t.strides() == strides;
  }
  Tensor empty() const {
    return Tensor(at::detail::empty_strided_cpu(sizes, strides, static_cast<at::ScalarType>(dtype)));
  }
};

struct Step {
  int64_t kernel, finish, finish_at;  // the second is called last, with the address of that word
  int64_t threads;
  Words words;
  Pairs addresses, inside;  // places of words, with the number of a tensor or the place of another word

  // The table after the kernel has answered in it.
  c10::SmallVector<int64_t, 128> run(const Tensors& tensors, const Pairs& given = {}) const {
    c10::SmallVector<int64_t, 128> table(words.begin(), words.end());
    const auto start = reinterpret_cast<int64_t>(table.data());
    for (const auto& [at, place] : inside) table[at] = start + 8 * place;
    for (const auto& [at, number] : addresses) table[at] = reinterpret_cast<int64_t>(tensors[number].const_data_ptr());
    for (const auto& [at, word] : given) table[at] = word;
    const auto function = reinterpret_cast<Kernel>(kernel);
    if (threads > 1 && fork_call != nullptr) {
      fork_call(function, table.data(), static_cast<unsigned>(threads), 0);
    } else {
      function(table.data());
    }
    if (finish != 0) reinterpret_cast<Kernel>(finish)(table.data() + finish_at);
    return table;
  }
};

struct Plan {
  int64_t threads;              // PyTorch's number of threads that it was made for
  std::vector<Layout> layouts;  // of the arguments, then of the outputs
  size_t arguments;
  Step forward, backward;  // backward's tensors: what is saved, the gradient, the result
  std::vector<size_t> saved;
  Layout gradient, result;
  Pairs carried;    // doubles, from a word of the forward pass to one of the backward pass
  int64_t refusal;  // the forward pass's word that says that the numbers will not do

  bool fits(const Tensors& tensors) const {
    if (tensors.size() != arguments || threads != at::get_num_threads()) return false;
    for (size_t i = 0; i < arguments; ++i) {
      if (!layouts[i].fits(tensors[i])) return false;
    }
    return true;
  }
};

struct Site {
  std::string name;
  py::object differentiate;
  std::vector<std::shared_ptr<const Plan>> plans;

  // By differentiable operators, from the gradients of all outputs, what is saved, and the numbers carried.
  Tensor gradient(const Plan& plan, const variable_list& grads, const Tensors& tensors, const Numbers& numbers) const {
    py::gil_scoped_acquire gil;
    const auto wrapped = [](const auto& list) {
      py::tuple result(list.size());
      for (size_t i = 0; i < list.size(); ++i) result[i] = py::reinterpret_steal<py::object>(THPVariable_Wrap(list[i]));
      return result;
    };
    py::list floats;
    for (const auto& number : numbers) floats.append(py::cast(number.toSymFloat()));
    const auto result = differentiate(wrapped(grads), wrapped(tensors), floats, py::cast(plan.result.sizes));
    return result.is_none() ? Tensor() : THPVariable_Unpack(result.ptr());
  }
};

// A tensor of PyTorch's own on the CPU, whose memory holds its numbers: no view as a negative, wrapper or fake.
bool plain(const Tensor& t) {
  static const c10::DispatchKeySet ordinary = at::detail::empty_cpu({0}, at::kFloat).key_set();
  return t.key_set() == ordinary;
}

// Neither a transform of torch.func, nor a tracer, nor a dispatch mode is at work.
bool undisturbed() {
  return c10::impl::tls_local_dispatch_key_set().included_ == c10::default_included_set &&
      !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

struct KernelNode final : Node {
  const Site* site = nullptr;
  std::shared_ptr<const Plan> plan;
  c10::SmallVector<SavedVariable, 4> saved;
  Numbers carried;  // the doubles of the plan's words

  std::string name() const override { return site->name; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved) variable.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    Tensors tensors;
    for (const auto& variable : saved) tensors.push_back(variable.unpack(getptr()));
    if (!task_should_compute_output(0)) return {Tensor()};
    if (!final(grads, tensors)) return {site->gradient(*plan, grads, tensors, carried)};
    auto grad = grads[0];
    if (!plan->gradient.fits(grad)) {
      auto dense = plan->gradient.empty();
      dense.copy_(grad);
      grad = std::move(dense);
    }
    tensors.push_back(std::move(grad));
    tensors.push_back(plan->result.empty());
    Pairs words;
    for (size_t i = 0; i < carried.size(); ++i) {
      words.emplace_back(plan->carried[i].second, std::bit_cast<int64_t>(carried[i].toDouble()));
    }
    plan->backward.run(tensors, words);
    return {std::move(tensors.back())};
  }

  // Compiled autograd's graph is that of a site and of layouts; what is kept, and the numbers, are its inputs.
  void compiled_args(CompiledNodeArgs& args) const override {
    args.collect(reinterpret_cast<int64_t>(site));
    for (const auto& layout : plan->layouts) {
      args.collect(layout.sizes);
      args.collect(layout.strides);
    }
    args.collect(c10::ArrayRef<SavedVariable>(saved), true);
    for (const auto& number : carried) args.collect(number);
  }

  // The gradient by differentiable operators is one call in that graph, which compilers see through.
  variable_list apply_with_saved(const variable_list& grads, SwapSavedVariables& swap) override {
    swap.before(saved);
    swap.before(carried);
    std::vector<at::IValue> kept;
    for (const auto& variable : saved) kept.emplace_back(variable.unpack(getptr()));
    kept.insert(kept.end(), carried.begin(), carried.end());
    std::vector<at::TypePtr> types;
    for (const auto& value : kept) types.push_back(value.isTensor() ? at::TensorType::get() : value.type());
    const auto function = [site = site, plan = plan](const variable_list& grads, const std::vector<at::IValue>& kept) {
      Tensors tensors;
      for (size_t i = 0; i < plan->saved.size(); ++i) tensors.push_back(kept[i].toTensor());
      return variable_list{site->gradient(*plan, grads, tensors, {kept.begin() + tensors.size(), kept.end()})};
    };
    const auto& compiler = torch::dynamo::autograd::getPyCompilerInterface();
    auto* python = swap.get_py_compiler();
    const bool custom = true;  // of which there can be several of a name
    const auto name = compiler->bind_function(python, site->name, function, std::move(types), custom);
    const auto edges = torch::dynamo::autograd::get_input_metadata(next_edges());
    const auto metadata = IValuePacker<std::remove_const_t<decltype(edges)>>::pack(edges);
    auto result = compiler->call_function(python, "apply_functional", name, grads, kept, metadata);
    swap.after(saved);
    swap.after(carried);
    return result;
  }

 private:
  // Whether the gradient of the first output alone is wanted, in numbers and for good.
  bool final(const variable_list& grads, const Tensors& tensors) const {
    if (!enabled || at::GradMode::is_enabled() || !undisturbed()) return false;
    if (!grads[0].defined() || !plain(grads[0])) return false;
    for (size_t i = 1; i < grads.size(); ++i) {
      if (grads[i].defined()) return false;
    }
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (!plain(tensors[i]) || !plan->layouts[plan->saved[i]].fits(tensors[i])) return false;
    }
    return true;
  }
};

template <typename Pointer>
Pointer new_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) {
    return Pointer(new KernelNode, [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<KernelNode>();
  }
}

void record(const Site* site, const std::shared_ptr<const Plan>& plan, const Tensors& tensors, Numbers&& carried) {
  NodePointer pointer = new_node<NodePointer>();
  auto& node = static_cast<KernelNode&>(*pointer);
  node.site = site;
  node.plan = plan;
  node.carried = std::move(carried);
  node.add_next_edge(torch::autograd::impl::gradient_edge(tensors[0]));
  for (size_t i = plan->arguments; i < tensors.size(); ++i) torch::autograd::set_history(tensors[i], pointer);
  for (const size_t number : plan->saved) node.saved.emplace_back(tensors[number], number >= plan->arguments);
}

// The first output of a site for such tensors, or None where no plan is known that does them.
PyObject* call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const auto* site = static_cast<Site*>(PyCapsule_GetPointer(given[0], kSite));
  if (site == nullptr) throw python_error();
  if (!enabled || !undisturbed()) Py_RETURN_NONE;
  Tensors tensors;
  for (Py_ssize_t i = 1; i < count; ++i) {
    if (given[i] == Py_None) {
      tensors.emplace_back();
      continue;
    }
    if (!THPVariable_CheckExact(given[i])) Py_RETURN_NONE;
    tensors.push_back(THPVariable_Unpack(given[i]));
    if (!plain(tensors.back())) Py_RETURN_NONE;
  }
  const bool grad_mode = at::GradMode::is_enabled();
  for (size_t i = 1; i < tensors.size(); ++i) {
    if (grad_mode && tensors[i].defined() && tensors[i].requires_grad()) Py_RETURN_NONE;
  }
  for (const auto& candidate : site->plans) {
    if (!candidate->fits(tensors)) continue;
    const auto plan = candidate;  // without the interpreter's lock, another thread may add one
    for (size_t i = plan->arguments; i < plan->layouts.size(); ++i) tensors.push_back(plan->layouts[i].empty());
    PyThreadState* state = PyEval_SaveThread();
    const auto table = plan->forward.run(tensors);
    PyEval_RestoreThread(state);
    if (plan->refusal > 0 && table[plan->refusal] != 0) break;
    if (grad_mode && tensors[0].requires_grad()) {
      Numbers carried;
      for (const auto& [from, to] : plan->carried) carried.emplace_back(std::bit_cast<double>(table[from]));
      record(site, plan, tensors, std::move(carried));
    }
    return THPVariable_Wrap(tensors[plan->arguments]);
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(NODE_NAME, m) {
  PyModule_AddFunctions(m.ptr(), methods);
  m.def("switch_on", [](bool on) { enabled = on; });
  m.def("use_threads", [](int64_t address) { fork_call = reinterpret_cast<decltype(fork_call)>(address); });
  // Sites live as long as the process, since nodes of any age point at them.
  m.def("site", [](std::string name, py::object differentiate) {
    return py::capsule(new Site{std::move(name), std::move(differentiate), {}}, kSite);
  });
  py::class_<Layout>(m, "Layout").def(py::init<int, Words, Words>());
  py::class_<Step>(m, "Step").def(py::init<int64_t, int64_t, int64_t, int64_t, Words, Pairs, Pairs>());
  py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan")
      .def(py::init<int64_t, std::vector<Layout>, size_t, Step, Step, std::vector<size_t>, Layout, Layout, Pairs, int64_t>());
  // The plan last added is asked first; the oldest is given up.
  m.def("add", [](const py::capsule& site, const std::shared_ptr<Plan>& plan) {
    auto& plans = site.get_pointer<Site>()->plans;
    plans.insert(plans.begin(), plan);
    if (plans.size() > kMostPlans) plans.pop_back();
  });
}
