// Plan of plan.py once more, for the caches' sake: a call asks the same questions of the same dictionaries, but
// right after a matrix product that is 2 to 3 us here and 12 in Python, where every frame and tuple comes from memory again.
// Included by node.cpp.
namespace {

// A reference that is given back.
struct Decref {
  void operator()(PyObject* object) const { Py_XDECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Decref>;

// Keys of dictionaries, made once: equal by address, so that a lookup compares no characters.
struct Names {
  PyObject* changes = PyUnicode_InternFromString("_changes");
  PyObject* requested = PyUnicode_InternFromString("requested");
  PyObject* parameters = PyUnicode_InternFromString("_parameters");
  PyObject* weight = PyUnicode_InternFromString("weight");
  PyObject* bias = PyUnicode_InternFromString("bias");
  PyObject* v = PyUnicode_InternFromString("v");
  PyObject* basis = PyUnicode_InternFromString("basis");
  PyObject* nodes_in_blocks = PyUnicode_InternFromString("nodes_in_blocks");
  PyObject* forward = PyUnicode_InternFromString("forward");
  PyObject* hooks[4] = {
      PyUnicode_InternFromString("_forward_hooks"), PyUnicode_InternFromString("_forward_pre_hooks"),
      PyUnicode_InternFromString("_backward_hooks"), PyUnicode_InternFromString("_backward_pre_hooks")};
};
const Names* names;  // from the module's initialisation on

// What must be as it was. Everything is owned by the Python objects that PlanObject holds.
struct Questions {
  PyObject *plans, *dispatch, *scope;  // globals of plan.py, dispatch.py and scope.py
  PyObject* global_hooks;      // tuple of dictionaries
  PyObject *changes, *requested, *state, *buffers, *parameters;
  PyObject *weight, *bias, *v, *basis;
  PyObject *selected, *selection;  // a ContextVar and its value, or None
  uint32_t version, computed_at;
  const void* address;  // of the weight's numbers
  bool lacks_right;
  int64_t dimensions, first_size;  // of inputs whose rows have the bank's ids, 0: any
};

// Of base/witness.py: numbers of the weight that B^T was computed from. None where there is no B^T.
struct Runs {
  int64_t bytes = 0, run_bytes = 0;  // of a number, of a run of them
  std::vector<int64_t> offsets;      // numbers from the weight's first
  std::vector<char> numbers;         // the runs one after another
};

struct Answer {
  Tensor v, table;
  SharedFrozen frozen;
  Runs runs;
};

struct PlanObject {
  PyObject_HEAD
  PyObject* arguments;  // of the constructor: they own what the questions point to
  Questions questions;
  Answer* answer;
};

PyObject* look_up(PyObject* dict, PyObject* name) { return PyDict_GetItemWithError(dict, name); }

bool is_empty(PyObject* dict) { return dict && PyDict_GET_SIZE(dict) == 0; }

bool selection_is_as_it_was(const Questions& q, const Tensor& table, const Tensor& x) {
  const bool in_backward = torch::autograd::get_current_graph_task_id() != -1;  // recomputed, in another block?
  if (in_backward && (q.selected != Py_None || look_up(q.scope, names->nodes_in_blocks) == Py_True)) return false;
  if (q.selected == Py_None) return true;
  if (q.dimensions && (x.dim() != q.dimensions || x.size(0) != q.first_size)) return false;
  if (table.defined() && (at::GradMode::is_enabled() || table._version() != q.computed_at)) return false;
  PyObject* value = nullptr;
  if (PyContextVar_Get(q.selected, nullptr, &value) < 0) throw python_error();
  return Owned(value).get() == q.selection;
}

bool python_is_as_it_was(const Questions& q, const Tensor& table, const Tensor& x) {
  if (look_up(q.plans, names->changes) != q.changes || look_up(q.dispatch, names->requested) != q.requested) return false;
  PyObject* own = look_up(q.state, names->parameters);
  if (!own || look_up(own, names->weight) != q.weight || look_up(own, names->bias) != q.bias) return false;
  if (look_up(q.parameters, names->v) != q.v || look_up(q.buffers, names->basis) != q.basis) return false;
  if (look_up(q.state, names->forward)) return false;
  for (PyObject* hooks : names->hooks) {
    if (!is_empty(look_up(q.state, hooks))) return false;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(q.global_hooks); ++i) {
    if (!is_empty(PyTuple_GET_ITEM(q.global_hooks, i))) return false;
  }
  return selection_is_as_it_was(q, table, x);
}

// A weight can be written through .data, which torch does not count. Asked after the product, which has just brought the
// weight into the caches: before it, each run is a fetch from memory that the product then waits for, 2 us a layer.
bool has_same_numbers(const Runs& runs, const void* weight) {
  const char* known = runs.numbers.data();
  for (const int64_t offset : runs.offsets) {
    if (std::memcmp(static_cast<const char*>(weight) + offset * runs.bytes, known, runs.run_bytes) != 0) return false;
    known += runs.run_bytes;
  }
  return true;
}

bool tensors_are_as_they_were(const Questions& q, const Answer& a, const Tensor& x) {
  const Tensor& weight = a.frozen->weight;
  const Maybe& bias = a.frozen->bias;
  return x.scalar_type() == weight.scalar_type() && x.device() == weight.device() && !weight.requires_grad() &&
         x.key_set().has(c10::DispatchKey::Dense) &&  // neither nested nor sparse
         !(bias && (bias->requires_grad() || bias->scalar_type() != x.scalar_type())) && weight._version() == q.version &&
         weight.const_data_ptr() == q.address && a.v.scalar_type() == a.frozen->basis.scalar_type() &&
         a.v.is_contiguous() &&
         !(q.lacks_right && x.requires_grad() && at::GradMode::is_enabled());
}

// Modes that want to see the call as Python makes it, and tangents, which plain operations carry on.
bool is_watched(const Tensor& x, const Tensor& v) {
  return at::autocast::is_autocast_enabled(x.device().type()) || at::impl::torch_function_mode_enabled() ||
         dispatch_is_watched() || has_tangent(x) || has_tangent(v);
}

// The adapted output, or None where something is not as it was.
PyObject* plan_run(PyObject* self, PyObject* input) {
  HANDLE_TH_ERRORS
  const auto& plan = *reinterpret_cast<PlanObject*>(self);
  if (Py_TYPE(input) != reinterpret_cast<PyTypeObject*>(THPVariableClass)) Py_RETURN_NONE;
  const Tensor& x = THPVariable_Unpack(input);
  const Answer& a = *plan.answer;
  if (!python_is_as_it_was(plan.questions, a.table, x) || !tensors_are_as_they_were(plan.questions, a, x) ||
      is_watched(x, a.v)) {
    Py_RETURN_NONE;
  }
  Tensor y;
  try {
    pybind11::gil_scoped_release others_may_run;
    y = linear_with_autograd(x, a.v, a.frozen);
  } catch (const std::invalid_argument& error) {  // as torch.ops raises it, and std::out_of_range
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  } catch (const std::out_of_range& error) {
    PyErr_SetString(PyExc_IndexError, error.what());
    return nullptr;
  }
  if (!has_same_numbers(a.runs, plan.questions.address)) Py_RETURN_NONE;
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

Owned attribute(PyObject* object, const char* name) {
  Owned found(PyObject_GetAttrString(object, name));
  if (!found) throw python_error();
  return found;
}

Tensor tensor(PyObject* frozen, const char* name) { return THPVariable_Unpack(attribute(frozen, name).get()); }

Maybe optional_tensor(PyObject* frozen, const char* name) {
  const Owned found = attribute(frozen, name);
  return found.get() == Py_None ? Maybe() : Maybe(THPVariable_Unpack(found.get()));
}

Runs runs_of(PyObject* held) {
  if (held == Py_None) return {};
  PyObject* witness = attribute(held, "witness").get();
  if (witness == Py_None) return {};
  const Tensor offsets = tensor(witness, "offsets"), bits = tensor(witness, "bits");
  const auto* numbers = static_cast<const char*>(bits.const_data_ptr());
  return {bits.element_size(), bits.size(1) * bits.element_size(),
          {offsets.const_data_ptr<int64_t>(), offsets.const_data_ptr<int64_t>() + offsets.numel()},
          {numbers, numbers + bits.nbytes()}};
}

std::optional<Parts> parts_held(PyObject* parts) {
  if (parts == Py_None) return std::nullopt;
  const Owned list = attribute(parts, "ends");
  std::vector<int64_t> ends;
  for (Py_ssize_t i = 0; i < PyList_Size(list.get()); ++i) ends.push_back(PyLong_AsLongLong(PyList_GET_ITEM(list.get(), i)));
  return Parts{tensor(parts, "basis"), tensor(parts, "projection"), std::move(ends)};
}

// Plan(plan, globals of plan.py, of dispatch.py and of scope.py, global hooks). The arguments own what is kept of them: fields of
// a NamedTuple do not change.
PyObject* plan_new(PyTypeObject* type, PyObject* arguments, PyObject*) {
  HANDLE_TH_ERRORS
  PyObject *plan, *plans, *dispatch, *scope, *global_hooks;
  if (!PyArg_ParseTuple(arguments, "OO!O!O!O!", &plan, &PyDict_Type, &plans, &PyDict_Type, &dispatch, &PyDict_Type, &scope,
                        &PyTuple_Type, &global_hooks)) {
    return nullptr;
  }
  const auto field = [](PyObject* tuple, const char* name) { return attribute(tuple, name).get(); };
  PyObject* frozen = field(plan, "frozen");
  auto answer = std::make_unique<Answer>(Answer{
      THPVariable_Unpack(field(plan, "v")),
      optional_tensor(plan, "table").value_or(Tensor()),
      std::make_shared<const Frozen>(Frozen{
          tensor(frozen, "weight"), optional_tensor(frozen, "bias"), tensor(frozen, "basis"), tensor(frozen, "projection"),
          optional_tensor(frozen, "adapter_ids"), optional_tensor(frozen, "right"), optional_tensor(frozen, "samples"),
          PyLong_AsLongLong(field(frozen, "order")), parts_held(field(frozen, "parts"))}),
      runs_of(field(plan, "held"))});
  const Questions questions{
      plans, dispatch, scope, global_hooks,
      field(plan, "changes"), field(plan, "requested"), field(plan, "state"), field(plan, "buffers"),
      field(plan, "parameters"), field(frozen, "weight"), field(frozen, "bias"), field(plan, "v"),
      field(frozen, "basis"), field(plan, "selected"), field(plan, "selection"), uint32_t(answer->frozen->weight._version()),
      uint32_t(PyLong_AsLongLong(field(plan, "computed_at"))),
      answer->frozen->weight.const_data_ptr(), field(plan, "lacks_right") == Py_True,
      PyLong_AsLongLong(field(plan, "dimensions")), PyLong_AsLongLong(field(plan, "first_size"))};
  auto* self = reinterpret_cast<PlanObject*>(type->tp_alloc(type, 0));
  if (!self) return nullptr;
  self->arguments = Py_NewRef(arguments);
  self->questions = questions;
  self->answer = answer.release();
  return reinterpret_cast<PyObject*>(self);
  END_HANDLE_TH_ERRORS
}

int plan_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(reinterpret_cast<PlanObject*>(self)->arguments);
  return 0;
}

void plan_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  auto& plan = *reinterpret_cast<PlanObject*>(self);
  delete plan.answer;
  Py_XDECREF(plan.arguments);
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* plan_of(PyObject* self, void*) {
  return Py_NewRef(PyTuple_GET_ITEM(reinterpret_cast<PlanObject*>(self)->arguments, 0));
}

PyMethodDef plan_methods[] = {{"run", plan_run, METH_O, "As plan.Plan.run."}, {}};
PyGetSetDef plan_attributes[] = {{"plan", plan_of, nullptr, "The plan.Plan it was made from.", nullptr}, {}};
PyType_Slot plan_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(plan_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(plan_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(plan_traverse)},
    {Py_tp_methods, plan_methods},
    {Py_tp_getset, plan_attributes},
    {}};
PyType_Spec plan_type = {"tinylora_kernels.linear._node.Plan", sizeof(PlanObject), 0,
                         Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, plan_slots};

PyObject* share_dx_from(PyObject*, PyObject* numbers) {
  const int64_t from = PyLong_AsLongLong(numbers);
  return PyErr_Occurred() ? nullptr : PyLong_FromLongLong(shared_from.exchange(from));
}
const Kernels* exchange(std::atomic<const Kernels*>& kernels, PyObject* address) {
  return kernels.exchange(static_cast<const Kernels*>(PyLong_AsVoidPtr(address)));
}
PyObject* use_kernels(PyObject*, PyObject* arguments) {
  PyObject *cpu, *cuda;
  if (!PyArg_ParseTuple(arguments, "O!O!", &PyLong_Type, &cpu, &PyLong_Type, &cuda)) return nullptr;
  const Owned before_cpu(PyLong_FromVoidPtr(const_cast<Kernels*>(exchange(cpu_kernels, cpu))));
  const Owned before_cuda(PyLong_FromVoidPtr(const_cast<Kernels*>(exchange(cuda_kernels, cuda))));
  return PyTuple_Pack(2, before_cpu.get(), before_cuda.get());
}
PyMethodDef functions[] = {
    {"use_kernels", use_kernels, METH_VARARGS,
     "Addresses of the native library's Kernels, CPU and CUDA, which calls that nobody watches run; 0: those run the ops. "
     "As they were."},
    {"share_dx_from", share_dx_from, METH_O, "Numbers of x from which layers that read it share its dx; as it was."}, {}};
PyModuleDef module_definition = {PyModuleDef_HEAD_INIT, "_node", nullptr, -1, functions};

}  // namespace

PyMODINIT_FUNC PyInit__node() {
  names = new Names;
  Owned module(PyModule_Create(&module_definition)), type(PyType_FromSpec(&plan_type));
  if (!module || !type || PyModule_AddObjectRef(module.get(), "Plan", type.get()) < 0) return nullptr;
  return module.release();
}
