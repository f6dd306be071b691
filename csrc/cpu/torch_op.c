/*
 * qcore::cpu_matmul for torch's dispatcher, without Python on the way: a call from Python costs two microseconds instead of twelve.
 *
 * torch's stable C interface (torch/csrc/inductor/aoti_torch/c/shim.h, from torch 2.8 on) is reached through pointers that the caller
 * looked up, so this file needs no header of torch, links to nothing and serves every torch that has these functions.
 * Tensors are passed as handles that the callee owns, numbers as 64 bits each.
 */
#include "qcore_cpu.h"

#include <stdlib.h>
#include <string.h>

typedef struct Tensor *Handle;
typedef uint64_t Value;

/* The functions, in the order of cpu_library.TORCH_FUNCTIONS. */
static struct {
    int32_t (*data_ptr)(Handle, void **);
    int32_t (*dim)(Handle, int64_t *);
    int32_t (*sizes)(Handle, int64_t **);
    int32_t (*strides)(Handle, int64_t **);
    int32_t (*numel)(Handle, int64_t *);
    int32_t (*dtype)(Handle, int32_t *);
    int32_t (*device_type)(Handle, int32_t *);
    int32_t (*empty_strided)(int64_t, const int64_t *, const int64_t *, int32_t, int32_t, int32_t, Handle *);
    int32_t (*delete_tensor)(Handle);
    void (*check)(_Bool, const char *, const char *, uint32_t, const char *); /* raises, through this file's frames */
    int32_t (*library)(const char *, const char *, const char *, uint32_t, void **);
    int32_t (*implement)(void *, const char *, void (*)(Value *, uint64_t, uint64_t));
    int (*max_threads)(void); /* omp_get_max_threads: what torch.set_num_threads set */
    void *parallel;           /* GOMP_parallel */
} torch;

enum { BYTE = 0, INT = 3, HALF = 5, FLOAT = 6, BFLOAT = 15 }; /* c10::ScalarType */
enum { MOST_DIMS = 64 };

typedef struct {
    void *data;
    int64_t dim, numel, *sizes, *strides;
    int32_t dtype, device;
} View;

static View view(Handle tensor) {
    View v;
    torch.data_ptr(tensor, &v.data);
    torch.dim(tensor, &v.dim);
    torch.numel(tensor, &v.numel);
    torch.sizes(tensor, &v.sizes);
    torch.strides(tensor, &v.strides);
    torch.dtype(tensor, &v.dtype);
    torch.device_type(tensor, &v.device);
    return v;
}

static int contiguous(const View *v) {
    int64_t expected = 1;
    for (int64_t d = v->dim - 1; d >= 0; d--) {
        if (v->sizes[d] != 1 && v->strides[d] != expected) return 0;
        expected *= v->sizes[d];
    }
    return 1;
}

/* The distance of rows that lie at equal distances, their elements side by side; 0 where they do not. */
static int64_t row_stride(const View *x, int64_t width) {
    int64_t stride = 0, rows = 1;
    if (width > 1 && x->strides[x->dim - 1] != 1) return 0;
    for (int64_t d = x->dim - 2; d >= 0; d--) {
        if (x->sizes[d] == 1) continue;
        if (rows == 1)
            stride = x->strides[d];
        else if (x->strides[d] != stride * rows)
            return 0;
        rows *= x->sizes[d];
    }
    return rows == 1 ? width : stride >= width ? stride : 0;
}

/* A contiguous copy of x of any strides. */
static void *packed_rows(const View *x, int64_t size) {
    char *copy = malloc((size_t)(x->numel * size) + 1);
    int64_t at[MOST_DIMS] = {0}, offset = 0;
    for (int64_t i = 0; copy && i < x->numel; i++) {
        memcpy(copy + i * size, (const char *)x->data + offset * size, (size_t)size);
        for (int64_t d = x->dim - 1; d >= 0; d--) {
            offset += x->strides[d];
            if (++at[d] < x->sizes[d]) break;
            offset -= x->strides[d] * x->sizes[d];
            at[d] = 0;
        }
    }
    return copy;
}

typedef struct {
    View x, packed, meta, perm;
    int64_t bits, group_size, columns, n, k, blocks, groups;
    int dtype, asym;
} Product;

/* What is wrong with the arguments, or null. */
static const char *unfit(const Product *p) {
    if (p->x.device || p->packed.device || p->meta.device || p->perm.device) return "cpu: expected all tensors on the CPU";
    if (p->dtype < 0) return "cpu: expected x of float32, bfloat16 or float16";
    if (p->x.dim < 1 || p->x.dim > MOST_DIMS || p->x.sizes[p->x.dim - 1] != p->columns) return "cpu: expected x of shape [..., in_features]";
    if (p->packed.dtype != BYTE || (p->meta.dtype != FLOAT && p->meta.dtype != HALF) || p->perm.dtype != INT)
        return "cpu: expected packed uint8, meta float32 or float16 and perm int32";
    if (!contiguous(&p->packed) || !contiguous(&p->meta) || !contiguous(&p->perm)) return "cpu: packed, meta and perm must be contiguous";
    const int floats = p->bits == QC_HALF_WEIGHT || p->bits == QC_BFLOAT_WEIGHT;
    if (p->bits < 2 || (p->bits > 8 && !floats) || p->n < 1 || p->k < 1 || (p->group_size != -1 && p->group_size < 1)) return "cpu: an argument is out of range";
    const int64_t tiles = (p->n + 15) / 16, groups = p->group_size == -1 ? 1 : (p->k + p->group_size - 1) / p->group_size;
    const int64_t stored = p->bits <= 4 ? p->bits : floats ? 16 : 8;
    if (p->packed.numel != tiles * ((p->k + 31) / 32) * 64 * stored || p->meta.numel != tiles * groups * 16 * (p->asym ? 2 : 1))
        return "cpu: packed and meta do not have the sizes of such a layer";
    return NULL;
}

/* Multiply into `to`, contiguous and of x's dtype; returns what went wrong, or null. */
static const char *multiply(const Product *p, void *to) {
    const int64_t m = p->columns ? p->x.numel / p->columns : 0, stride = row_stride(&p->x, p->columns);
    void *copy = stride ? NULL : packed_rows(&p->x, p->dtype == QC_FLOAT32 ? 4 : 2);
    if (!stride && !copy) return "cpu: no memory";
    const int status = qc_cpu_matmul(
        (int)p->bits, p->dtype, m, p->n, p->columns, p->k, p->group_size, p->asym, p->meta.dtype == HALF, copy ? copy : p->x.data,
        stride ? stride : p->columns, p->packed.data, p->meta.data, p->perm.numel ? p->perm.data : NULL, to, p->n, torch.max_threads(), 0,
        torch.parallel);
    free(copy);
    return status ? qc_error_string(status) : NULL;
}

static Product product(const Value *stack) {
    Product p = {.x = view((Handle)stack[0]), .packed = view((Handle)stack[1]), .meta = view((Handle)stack[2]), .perm = view((Handle)stack[3])};
    p.bits = (int64_t)stack[4];
    p.group_size = (int64_t)stack[5];
    p.asym = (stack[6] & 255) != 0;
    p.columns = (int64_t)stack[7];
    p.n = (int64_t)stack[8];
    p.k = p.perm.numel ? p.perm.numel : p.columns;
    p.dtype = p.x.dtype == FLOAT ? QC_FLOAT32 : p.x.dtype == BFLOAT ? QC_BFLOAT16 : p.x.dtype == HALF ? QC_FLOAT16 : -1;
    return p;
}

/* A new tensor [..., n] for x [..., columns]. */
static Handle result(const Product *p) {
    int64_t sizes[MOST_DIMS], strides[MOST_DIMS], step = 1;
    Handle made = NULL;
    for (int64_t d = p->x.dim - 1; d >= 0; d--) {
        sizes[d] = d == p->x.dim - 1 ? p->n : p->x.sizes[d];
        strides[d] = step;
        step *= sizes[d] > 0 ? sizes[d] : 1;
    }
    return torch.empty_strided(p->x.dim, sizes, strides, p->x.dtype, 0, 0, &made) ? NULL : made;
}

/* Let go of what was passed and of a result that is none, then say what was wrong, if anything. */
static void finish(Value *stack, Handle y, const char *wrong) {
    for (int i = 0; i < 4; i++) torch.delete_tensor((Handle)stack[i]);
    if (wrong && y) torch.delete_tensor(y);
    if (wrong) torch.check(0, "cpu_matmul", "torch_op.c", 0, wrong);
}

/* cpu_matmul(x, packed, meta, perm, bits, group_size, asym, in_features, out_features) */
static void cpu_matmul(Value *stack, uint64_t arguments, uint64_t results) {
    (void)arguments, (void)results;
    const Product p = product(stack);
    const char *wrong = unfit(&p);
    Handle y = wrong ? NULL : result(&p);
    void *data = NULL;
    if (!wrong && (!y || torch.data_ptr(y, &data))) wrong = "cpu: no memory";
    if (!wrong) wrong = multiply(&p, data);
    finish(stack, y, wrong);
    stack[0] = (Value)y;
}

/* The same with a tensor to write to. */
static void cpu_matmul_out(Value *stack, uint64_t arguments, uint64_t results) {
    (void)arguments, (void)results;
    const Product p = product(stack);
    const Handle out = (Handle)stack[9];
    const View y = view(out);
    const char *wrong = unfit(&p);
    if (!wrong && (y.device || y.dtype != p.x.dtype || y.dim != p.x.dim || !contiguous(&y) || y.numel * p.columns != p.x.numel * p.n))
        wrong = "cpu: expected a contiguous out of x's dtype, [..., out_features]";
    if (!wrong) wrong = multiply(&p, y.data);
    finish(stack, out, wrong);
    stack[0] = (Value)out;
}

int qc_torch_register(const void *const *functions, int64_t count) {
    void *library;
    if (count * sizeof(void *) != sizeof torch || !functions) return QC_BAD_ARGUMENT;
    memcpy(&torch, functions, sizeof torch);
    if (torch.library("qcore", "CPU", "torch_op.c", 0, &library)) return QC_BAD_ARGUMENT;
    if (torch.implement(library, "cpu_matmul", cpu_matmul) || torch.implement(library, "cpu_matmul_out", cpu_matmul_out)) return QC_BAD_ARGUMENT;
    return QC_OK; /* the library lives as long as the process */
}
