// One autograd node for every layer whose two passes are compiled kernels, without Python in either.
//
// A *step* is kernels with a table of 64-bit words to call them with: literals, addresses of tensors, and addresses
// inside the table itself. A *plan* is what a layer does for tensors of given layouts: a step forward, a step backward,
// and what is kept in between. A *site* is a layer with its options: the plans met so far, and a Python function of the
// same gradients out of differentiable operators. Python writes all of them (plan.py); here they are run.
//
// `call` answers None wherever something else is wanted than plain numbers and their gradients: other layouts,
// subclasses, `vmap`, forward mode, dispatch modes, tracing. Python's own way then takes over. So it does in a backward
// pass that wants more than numbers: one that is differentiated, or traced by compiled autograd.

#include "plan.h"

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

namespace py = pybind11;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::IValuePacker;
using torch::dynamo::autograd::SwapSavedVariables;

namespace reimpl {
namespace {

// A std::shared_ptr or, in later releases, a c10::intrusive_ptr.
using NodePointer = decltype(torch::autograd::Edge::function);
using Numbers = c10::SmallVector<at::IValue, 2>;

constexpr const char* kSite = "reimpl.site";

// Whether the kernels are switched on.
bool enabled = false;

struct Site {
  std::string name;
  py::object differentiate;
  std::vector<std::shared_ptr<const Plan>> plans;

  // By differentiable operators, from the gradients of all outputs, what is saved, the numbers carried, the first
  // argument's shape, and the numbers of the arguments that want gradients.
  variable_list gradients(
      const Plan& plan,
      const variable_list& grads,
      const Tensors& tensors,
      const Numbers& numbers,
      const Words& shape) const {
    py::gil_scoped_acquire gil;
    const auto wrapped = [](const auto& list) {
      py::tuple result(list.size());
      for (size_t i = 0; i < list.size(); ++i) result[i] = py::reinterpret_steal<py::object>(THPVariable_Wrap(list[i]));
      return result;
    };
    py::list floats;
    for (const auto& number : numbers) floats.append(py::cast(number.toSymFloat()));
    const py::tuple found =
        differentiate(wrapped(grads), wrapped(tensors), floats, py::cast(shape), py::cast(plan.differentiable));
    variable_list results;
    for (const auto& one : found) results.push_back(one.is_none() ? Tensor() : THPVariable_Unpack(one.ptr()));
    return results;
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
  Layout own;  // of all tensors, where the plan does any
  c10::SmallVector<SavedVariable, 5> saved;
  Numbers carried;  // the doubles of the plan's words

  std::string name() const override { return site->name; }

  const Layout& layout(size_t i) const { return plan->everywhere() ? own : plan->layouts[i]; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved) variable.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    Tensors tensors;
    for (const auto& variable : saved) tensors.push_back(variable.unpack(getptr()));
    if (!final(grads, tensors)) return site->gradients(*plan, grads, tensors, carried, layout(0).sizes);
    auto grad = grads[0];
    const auto& like = layout(plan->arguments);
    if (!like.fits(grad)) {
      auto dense = like.empty();
      dense.copy_(grad);
      grad = std::move(dense);
    }
    tensors.push_back(std::move(grad));
    const auto first = tensors.size();
    for (const size_t i : plan->differentiable) tensors.push_back(layout(i).empty());
    Pairs words;
    for (size_t i = 0; i < carried.size(); ++i) {
      words.emplace_back(plan->carried[i].second, std::bit_cast<int64_t>(carried[i].toDouble()));
    }
    plan->backward.run(tensors, {}, words);
    return variable_list(tensors.begin() + first, tensors.end());
  }

  // Compiled autograd's graph is that of a site and of layouts; what is kept, and the numbers, are its inputs.
  void compiled_args(CompiledNodeArgs& args) const override {
    args.collect(reinterpret_cast<int64_t>(site));
    for (size_t i = 0; i < plan->layouts.size(); ++i) {
      args.collect(layout(i).sizes);
      args.collect(layout(i).strides);
    }
    for (const size_t i : plan->differentiable) args.collect(static_cast<int64_t>(i));
    args.collect(c10::ArrayRef<SavedVariable>(saved), true);
    for (const auto& number : carried) args.collect(number);
  }

  // The gradients by differentiable operators are one call in that graph, which compilers see through.
  variable_list apply_with_saved(const variable_list& grads, SwapSavedVariables& swap) override {
    swap.before(saved);
    swap.before(carried);
    std::vector<at::IValue> kept;
    for (const auto& variable : saved) kept.emplace_back(variable.unpack(getptr()));
    kept.insert(kept.end(), carried.begin(), carried.end());
    std::vector<at::TypePtr> types;
    for (const auto& value : kept) types.push_back(value.isTensor() ? at::TensorType::get() : value.type());
    const auto function = [site = site, plan = plan, shape = layout(0).sizes](
                              const variable_list& grads, const std::vector<at::IValue>& kept) {
      Tensors tensors;
      for (size_t i = 0; i < plan->saved.size(); ++i) tensors.push_back(kept[i].toTensor());
      return site->gradients(*plan, grads, tensors, {kept.begin() + tensors.size(), kept.end()}, shape);
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
  // Whether the gradient of the first output alone is given, in numbers and for good.
  bool final(const variable_list& grads, const Tensors& tensors) const {
    if (!enabled || at::GradMode::is_enabled() || !undisturbed()) return false;
    if (!grads[0].defined() || !plain(grads[0])) return false;
    for (size_t i = 1; i < grads.size(); ++i) {
      if (grads[i].defined()) return false;
    }
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (!plain(tensors[i]) || !layout(plan->saved[i]).fits(tensors[i])) return false;
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
  if (plan->everywhere()) node.own = Layout::of(tensors[0]);
  node.carried = std::move(carried);
  for (const size_t i : plan->differentiable) node.add_next_edge(torch::autograd::impl::gradient_edge(tensors[i]));
  const auto recorded = [&](size_t i) { return i >= plan->arguments && at::isFloatingType(tensors[i].scalar_type()); };
  for (size_t i = plan->arguments; i < tensors.size(); ++i) {
    if (recorded(i)) torch::autograd::set_history(tensors[i], pointer);
  }
  for (const size_t i : plan->saved) node.saved.emplace_back(tensors[i], recorded(i));
}

// The first output of a site for such tensors and floats, or None where no plan is known that does them.
PyObject* call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const auto* site = static_cast<Site*>(PyCapsule_GetPointer(given[0], kSite));
  if (site == nullptr) throw python_error();
  if (!enabled || !undisturbed()) Py_RETURN_NONE;
  Tensors tensors;
  std::vector<double> floats;
  for (Py_ssize_t i = 1; i < count; ++i) {
    if (given[i] == Py_None) {
      tensors.emplace_back();
    } else if (THPVariable_CheckExact(given[i])) {
      tensors.push_back(THPVariable_Unpack(given[i]));
      if (!plain(tensors.back())) Py_RETURN_NONE;
    } else if (PyFloat_CheckExact(given[i])) {
      floats.push_back(PyFloat_AS_DOUBLE(given[i]));
    } else {
      Py_RETURN_NONE;
    }
  }
  uint64_t wanting = 0;
  for (size_t i = 0; i < tensors.size() && at::GradMode::is_enabled(); ++i) {
    if (tensors[i].defined() && tensors[i].requires_grad()) wanting |= uint64_t{1} << i;
  }
  for (const auto& candidate : site->plans) {
    if (!candidate->fits(tensors, wanting)) continue;
    const auto plan = candidate;  // without the interpreter's lock, another thread may add one
    for (size_t i = plan->arguments; i < plan->layouts.size(); ++i) {
      tensors.push_back((plan->everywhere() ? Layout::of(tensors[0]) : plan->layouts[i]).empty());
    }
    PyThreadState* state = PyEval_SaveThread();
    const auto table = plan->forward.run(tensors, floats);
    PyEval_RestoreThread(state);
    if (plan->refusal > 0 && table[plan->refusal] != 0) break;
    for (const size_t i : plan->changed) tensors[i].unsafeGetTensorImpl()->bump_version();
    if (wanting != 0) {
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
}  // namespace reimpl

PYBIND11_MODULE(NODE_NAME, m) {
  using namespace reimpl;
  PyModule_AddFunctions(m.ptr(), methods);
  m.attr("MOST_PLANS") = MOST_PLANS;
  m.def("switch_on", [](bool on) { enabled = on; });
  m.def("use_threads", [](int64_t address) { fork_call = reinterpret_cast<decltype(fork_call)>(address); });
  // Sites live as long as the process, since nodes of any age point at them.
  m.def("site", [](std::string name, py::object differentiate) {
    return py::capsule(new Site{std::move(name), std::move(differentiate), {}}, kSite);
  });
  py::class_<Layout>(m, "Layout").def(py::init<int, Words, Words>());
  py::class_<Step>(m, "Step")
      .def(py::init<>())
      .def_readwrite("launches", &Step::launches)
      .def_readwrite("words", &Step::words)
      .def_readwrite("addresses", &Step::addresses)
      .def_readwrite("inside", &Step::inside)
      .def_readwrite("rooms", &Step::rooms)
      .def_readwrite("numbers", &Step::numbers)
      .def_readwrite("shares", &Step::shares)
      .def_readwrite("room", &Step::room)
      .def_readwrite("grain", &Step::grain);
  py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan")
      .def(py::init<>())
      .def_readwrite("threads", &Plan::threads)
      .def_readwrite("layouts", &Plan::layouts)
      .def_readwrite("arguments", &Plan::arguments)
      .def_readwrite("forward", &Plan::forward)
      .def_readwrite("backward", &Plan::backward)
      .def_readwrite("differentiable", &Plan::differentiable)
      .def_readwrite("changed", &Plan::changed)
      .def_readwrite("saved", &Plan::saved)
      .def_readwrite("carried", &Plan::carried)
      .def_readwrite("refusal", &Plan::refusal);
  // The plan last added is asked first; the oldest is given up.
  m.def("add", [](const py::capsule& site, const std::shared_ptr<Plan>& plan) {
    for (const size_t i : plan->differentiable) plan->wanted |= uint64_t{1} << i;
    auto& plans = site.get_pointer<Site>()->plans;
    plans.insert(plans.begin(), plan);
    if (plans.size() > MOST_PLANS) plans.pop_back();
  });
}
