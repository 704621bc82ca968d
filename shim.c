#define _GNU_SOURCE
#define FUSE_USE_VERSION 34
#include <fuse3/fuse_lowlevel.h>
#include <dlfcn.h>
#include <string.h>
static struct fuse_lowlevel_ops ops;
static void (*old_init)(void*, struct fuse_conn_info*);
static void init(void*u, struct fuse_conn_info*c){ old_init(u,c); if(c->capable & FUSE_CAP_DONT_MASK) c->want |= FUSE_CAP_DONT_MASK; }
struct fuse_session *fuse_session_new(struct fuse_args *a, const struct fuse_lowlevel_ops *op, size_t n, void *u){
 struct fuse_session *(*f)(struct fuse_args*, const struct fuse_lowlevel_ops*, size_t, void*) = dlsym(RTLD_NEXT,"fuse_session_new");
 memcpy(&ops, op, n); old_init=ops.init; ops.init=init; return f(a,&ops,n,u);
}
