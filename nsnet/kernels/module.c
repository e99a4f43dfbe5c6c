/* nsnet_kernels: the two loops of preparing an image that take longer in numpy and Pillow. Optional: without this
 * module `nsnet` uses those, with the same results. Each function checks its arrays and releases Python's lock. */
#include <Python.h>

#include "kernels.h"

/* Get a (height, width, 3) uint8 image whose pixels lie side by side in each row. */
static int get_image(PyObject *object, Py_buffer *image)
{
    if (PyObject_GetBuffer(object, image, PyBUF_STRIDED_RO) < 0)
        return -1;
    if (image->ndim == 3 && image->itemsize == 1 && image->shape[2] == 3 && image->strides[2] == 1 &&
        image->strides[1] == 3)
        return 0;
    PyBuffer_Release(image);
    PyErr_SetString(PyExc_ValueError, "the image must be (H, W, 3) uint8, with pixels side by side in each row");
    return -1;
}

/* Get a writable contiguous result of so many items of a size. */
static int get_result(PyObject *object, Py_buffer *result, Py_ssize_t itemsize, Py_ssize_t items)
{
    if (PyObject_GetBuffer(object, result, PyBUF_CONTIG) < 0)
        return -1;
    if (result->itemsize == itemsize && result->len == itemsize * items)
        return 0;
    PyBuffer_Release(result);
    PyErr_Format(PyExc_ValueError, "the result must hold %zd items of %zd bytes", items, itemsize);
    return -1;
}

static PyObject *entropy(PyObject *module, PyObject *arguments)
{
    PyObject *given, *target;
    Py_buffer image, result;
    int is_power, is_portable = 0, is_luma = 0;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OOp|pp", &given, &target, &is_power, &is_portable, &is_luma) ||
        get_image(given, &image) < 0)
        return NULL;
    Py_ssize_t rows = image.shape[0] / PATCH_PX, columns = image.shape[1] / PATCH_PX;
    if (get_result(target, &result, sizeof(double), rows * columns) < 0) {
        PyBuffer_Release(&image);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    estimate_entropy(image.buf, image.strides[0], rows, columns, is_power, is_portable, is_luma, result.buf);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&image);
    PyBuffer_Release(&result);
    Py_RETURN_NONE;
}

static PyObject *resize(PyObject *module, PyObject *arguments)
{
    PyObject *given, *target;
    Py_buffer image, result;
    Py_ssize_t side;
    int is_portable = 0, failed;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OOn|p", &given, &target, &side, &is_portable) || get_image(given, &image) < 0)
        return NULL;
    if (side < 1 || side > 1 << 14 || image.shape[0] < 1 || image.shape[1] < 1) {
        PyBuffer_Release(&image);
        PyErr_SetString(PyExc_ValueError, "the image must not be empty, and the side 1 to 16,384");
        return NULL;
    }
    if (get_result(target, &result, 1, 3 * side * side) < 0) {
        PyBuffer_Release(&image);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    failed = resize_bicubic(image.buf, image.strides[0], image.shape[0], image.shape[1], side, is_portable, result.buf);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&image);
    PyBuffer_Release(&result);
    if (failed)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"entropy", entropy, METH_VARARGS,
     "entropy(image, result, is_power, is_portable=False, is_luma=False): fill a float64 result, one value for each "
     "whole patch of an (H, W, 3) uint8 image, row by row, in nats."},
    {"resize", resize, METH_VARARGS,
     "resize(image, result, side, is_portable=False): fill a (side, side, 3) uint8 result with an (H, W, 3) uint8 "
     "image. is_portable: without the processor's own instructions, as on any other."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "nsnet_kernels", .m_methods = methods};

PyMODINIT_FUNC PyInit_nsnet_kernels(void)
{
    prepare_entropy();
    PyObject *module = PyModule_Create(&definition);
    /* LUMA: `entropy` takes is_luma; callers may find a module of an older installation, without it. */
    if (module != NULL && (PyModule_AddIntConstant(module, "PATCH_PX", PATCH_PX) < 0 ||
                           PyModule_AddIntConstant(module, "LUMA", 1) < 0))
        Py_CLEAR(module);
    return module;
}
