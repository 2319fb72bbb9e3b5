"""The compiled half of ``_walk``: follows pointers from Python's objects to the numbers' addresses, in one pass.

Dictionaries and lists are read through Python's stable C interface; tensors through the stable C interface of PyTorch's
exported models, and at the four offsets that ``_walk`` finds out. Nothing is counted, boxed or allocated on the way,
and the first loops follow one pointer each, so that the processor waits for many of them at a time.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from reimpl.optim._numba_ops import pointer, prefetch

# places in ``api``, which ``_walk`` fills: addresses of C functions, offsets, and room for what the functions return
DICT_NEXT, LIST_ITEM, LIST_SIZE, DATA_PTR, DTYPE, DIM, SIZES, STRIDES = range(8)
STORAGE, VERSION, COUNT, FORM, KEYS, META, GRAD, UNDEFINED = range(8, 16)
RESULT, POSITION, KEY, VALUE = range(16, 20)
API_SIZE = 20
# places in a question, which ``_walk`` asks: one word each, and then the address and the length of an array each
API, THE_LIST, KIND, PLAIN_KEYS = range(4)
ITEMS, DICTIONARIES, STARTS, ENTRIES, WHERE, PARAMS, FORM_STARTS, FORMS, ROOM, MARKS, ROW = range(4, 26, 2)
QUESTION_SIZE = 26
INLINE = 5
"""Of so many dimensions, sizes and strides stand in the body itself; of more, elsewhere."""
AHEAD = 8
"""How many tensors ahead lines are fetched: about as many as a processor has under way."""


@intrinsic
def call(typingctx: Any, function: Any, arguments: Any) -> Any:
    """Call the C function at the address ``function``; arguments and result are 64-bit words."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        form = ir.FunctionType(ir.IntType(64), [ir.IntType(64)] * arguments.count)
        words = [builder.extract_value(values[1], k) for k in range(arguments.count)]
        return builder.call(builder.inttoptr(values[0], form.as_pointer()), words)

    return types.int64(types.int64, arguments), codegen


@njit(inline="always")
def word(address: Any) -> Any:
    """The 64-bit word at the address."""
    return carray(pointer(address), (1,), np.int64)[0]


@njit(inline="always")
def ask(api: Any, function: Any, tensor: Any) -> Any:
    """What one of the functions with the signature ``(tensor, *result)`` says of the tensor."""
    room = api.ctypes.data + 8 * RESULT
    api[RESULT] = 0
    call(api[function], (tensor, room))
    return api[RESULT]


@njit(inline="always")
def has_form(api: Any, tensor: Any, dtype: Any, form: Any, start: Any, stop: Any) -> Any:
    """Whether the tensor has the dtype, and the sizes and then strides at ``form[start:stop]``."""
    n = (stop - start) // 2
    if ask(api, DTYPE, tensor) != dtype or ask(api, DIM, tensor) != n:
        return False
    sizes, strides = ask(api, SIZES, tensor), ask(api, STRIDES, tensor)
    for k in range(n):
        if word(sizes + 8 * k) != form[start + k] or word(strides + 8 * k) != form[start + n + k]:
            return False
    return True


@njit
def same_items(api: Any, items: Any, objects: Any) -> Any:
    """Whether the list holds the objects at these addresses, and no more."""
    if call(api[LIST_SIZE], (items,)) != len(objects):
        return False
    for i in range(len(objects)):  # noqa: SIM110 (compiled: all() over a generator is slower)
        if call(api[LIST_ITEM], (items, i)) != objects[i]:
            return False
    return True


@njit
def same_entries(api: Any, dictionaries: Any, starts: Any, entries: Any) -> Any:
    """Whether dictionary ``i`` holds the keys and values ``entries[2 * starts[i] : 2 * starts[i + 1]]``, no more."""
    room = api.ctypes.data
    for i in range(len(dictionaries)):
        arguments = (dictionaries[i], room + 8 * POSITION, room + 8 * KEY, room + 8 * VALUE)
        api[POSITION] = 0
        for k in range(starts[i], starts[i + 1]):
            more = call(api[DICT_NEXT], arguments) & 1
            if more == 0 or api[KEY] != entries[2 * k] or api[VALUE] != entries[2 * k + 1]:
                return False
        if call(api[DICT_NEXT], arguments) & 1 == 1:
            return False
    return True


@njit
def same_places(api: Any, where: Any) -> Any:
    """Whether tensors are as ``where`` has it.

    Its rows are their handles, the bodies (``TensorImpl``) that they had, those bodies' storages, the places where they
    lay, and how many bytes they have.
    """
    tensors, bodies, storages, places = where[0], where[1], where[2], where[3]
    n = len(tensors)
    for i in range(n):
        if word(tensors[i]) != bodies[i]:
            return False
    for i in range(n):
        ahead = min(i + AHEAD, n - 1)
        prefetch(bodies[ahead])
        prefetch(bodies[ahead] + 128)
        prefetch(storages[ahead])
        if ask(api, DATA_PTR, tensors[i]) != places[i]:
            return False
    return True


@njit(inline="always")
def known(api: Any, body: Any, mark: Any) -> Any:
    """Whether the words in which a body keeps sizes, strides and dtype are those of ``mark``."""
    same = True
    for k in range(len(mark)):
        same &= word(body + api[FORM] + 8 * k) == mark[k]
    return same


@njit
def read_gradients(api: Any, params: Any, starts: Any, forms: Any, dtype: Any, keys: Any, room: Any, marks: Any) -> Any:
    """Write the gradients' addresses to ``room[0]``, 0 where there is none, and the version counters' to ``room[2]``.

    ``params`` holds the parameters' handles, bodies, storages, places and sizes. ``marks[0, i]`` and ``marks[1, i]``
    keep what the bodies of parameter ``i`` and of its gradient looked like when they were last asked for their form;
    what looks the same has the same.

    Returns:
        ``False`` where a parameter is not where it was, or it or its gradient is of another kind than expected: a
        subclass with operators of its own, a lazy negation, another dtype, other sizes or strides, in the parameter's
        own memory.
    """
    tensors, own, storages, places, lengths = params[0], params[1], params[2], params[3], params[4]
    handles, bodies, versions = room[0], room[1], room[2]
    n = len(tensors)
    for i in range(n):
        body = word(tensors[i])
        if body != own[i] or word(body + api[KEYS]) != keys:
            return False
        prefetch(storages[i])
        bodies[i] = word(body + api[META])
        versions[i] = word(body + api[VERSION])
    for i in range(n):
        # a tensor without autograd's part has no gradient
        handles[i] = bodies[i] + api[GRAD] if bodies[i] != 0 else 0
        bodies[i] = word(handles[i]) if bodies[i] != 0 else api[UNDEFINED]
        prefetch(bodies[i] + api[KEYS])
        prefetch(bodies[i])
    for i in range(n):
        if bodies[i] != api[UNDEFINED]:
            if word(bodies[i] + api[KEYS]) != keys:
                return False
            prefetch(word(bodies[i] + api[STORAGE]))
    for i in range(n):
        gradient = handles[i]
        handles[i] = 0
        if ask(api, DATA_PTR, tensors[i]) != places[i]:
            return False
        if bodies[i] == api[UNDEFINED]:
            continue
        for j, tensor in enumerate((tensors[i], gradient)):
            body = own[i] if j == 0 else bodies[i]
            within = starts[i + 1] - starts[i] <= 2 * INLINE
            if not (within and known(api, body, marks[j, i])):
                if not has_form(api, tensor, dtype, forms, starts[i], starts[i + 1]):
                    return False
                for k in range(marks.shape[2]):
                    marks[j, i, k] = word(body + api[FORM] + 8 * k)
        handles[i] = ask(api, DATA_PTR, gradient)
        if abs(handles[i] - places[i]) < lengths[i]:
            return False
        if handles[i] == 0:  # an empty tensor has no address, and 0 says that there is no gradient
            handles[i] = 1
        prefetch(versions[i])
    return True


@njit(inline="always")
def array(words: Any, at: Any) -> Any:
    """The array whose address and length stand in the question from ``at`` on."""
    return carray(pointer(words[at]), (words[at + 1],), np.int64)


@njit(inline="always")
def table(words: Any, at: Any, rows: Any) -> Any:
    """The same in so many rows."""
    return carray(pointer(words[at]), (rows, words[at + 1] // rows), np.int64)


@cfunc("boolean(voidptr)", cache=True)
def unchanged(question: Any) -> Any:
    """The answer to a ``_walk.Question``; where it is yes, the gradients' addresses are in the row."""
    words = carray(question, (QUESTION_SIZE,), np.int64)
    api = carray(pointer(words[API]), (API_SIZE,), np.int64)
    if words[THE_LIST] != 0 and not same_items(api, words[THE_LIST], array(words, ITEMS)):
        return False
    if not same_entries(api, array(words, DICTIONARIES), array(words, STARTS), array(words, ENTRIES)):
        return False
    n = words[ROW + 1]
    if n != 0:
        room, row = table(words, ROOM, 3), array(words, ROW)
        marks = carray(pointer(words[MARKS]), (2, n, words[MARKS + 1] // (2 * n)), np.int64)
        forms = array(words, FORM_STARTS), array(words, FORMS)
        if not read_gradients(api, table(words, PARAMS, 5), *forms, words[KIND], words[PLAIN_KEYS], room, marks):
            return False
        for i in range(n):
            row[i] = room[0, i]
    return same_places(api, table(words, WHERE, 5))


@cfunc("void(voidptr)", cache=True)
def count_change(question: Any) -> None:
    """Add one to the versions, by which autograd sees that tensors were changed, of parameters with a gradient."""
    words = carray(question, (QUESTION_SIZE,), np.int64)
    api = carray(pointer(words[API]), (API_SIZE,), np.int64)
    versions, row = table(words, ROOM, 3)[2], array(words, ROW)
    for i in range(len(row)):
        if row[i] != 0 and versions[i] != 0:  # tensors made in inference mode have none
            carray(pointer(versions[i] + api[COUNT]), (1,), np.uint32)[0] += np.uint32(1)
