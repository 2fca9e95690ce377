/* A folder behind latency: a read-only FUSE pass-through in which every answer comes late.

       gcc -O2 slow_folder.c -o slow_folder $(pkg-config fuse3 --cflags --libs)
       slow_folder SOURCE READ_US METADATA_US BACKGROUND COUNTS -f MOUNT

   READ_US is slept before each read, METADATA_US before each lookup, open and listing; answers overlap, as those of a
   server do, and there is no limit on bandwidth. BACKGROUND is how many reads ahead the kernel may have outstanding.
   The kernel caches names and pages until the folder is unmounted; then COUNTS gets one line: reads, bytes read,
   metadata answers. */
#define FUSE_USE_VERSION 31
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const char *source, *counts;
static long read_us, metadata_us;
static unsigned background;
static atomic_long reads, read_bytes, metadata;

static void late(long us) {
  struct timespec left = {us / 1000000, us % 1000000 * 1000};
  while (us && nanosleep(&left, &left) && errno == EINTR) {
  }
}

static void full(char *path, const char *name) {
  snprintf(path, PATH_MAX, "%s%s", source, name);
  atomic_fetch_add(&metadata, 1);
  late(metadata_us);
}

static void *slow_init(struct fuse_conn_info *connection, struct fuse_config *config) {
  connection->max_background = background;
  connection->congestion_threshold = background;
  config->kernel_cache = 1;
  config->entry_timeout = config->attr_timeout = config->negative_timeout = 86400;
  return NULL;
}

static int slow_getattr(const char *name, struct stat *found, struct fuse_file_info *file) {
  char path[PATH_MAX];
  if (file) return fstat((int)file->fh, found) ? -errno : 0;
  full(path, name);
  return lstat(path, found) ? -errno : 0;
}

static int slow_readlink(const char *name, char *target, size_t size) {
  char path[PATH_MAX];
  full(path, name);
  ssize_t length = readlink(path, target, size - 1);
  if (length < 0) return -errno;
  target[length] = 0;
  return 0;
}

static int slow_readdir(const char *name, void *buffer, fuse_fill_dir_t fill, off_t offset, struct fuse_file_info *file,
                        enum fuse_readdir_flags flags) {
  char path[PATH_MAX];
  (void)offset, (void)file, (void)flags;
  full(path, name);
  DIR *folder = opendir(path);
  if (!folder) return -errno;
  for (struct dirent *entry; (entry = readdir(folder));) fill(buffer, entry->d_name, NULL, 0, 0);
  closedir(folder);
  return 0;
}

static int slow_open(const char *name, struct fuse_file_info *file) {
  char path[PATH_MAX];
  full(path, name);
  int opened = open(path, O_RDONLY | O_CLOEXEC);
  if (opened < 0) return -errno;
  file->fh = (uint64_t)opened;
  return 0;
}

static int slow_read(const char *name, char *buffer, size_t size, off_t offset, struct fuse_file_info *file) {
  (void)name;
  late(read_us);
  ssize_t got = pread((int)file->fh, buffer, size, offset);
  if (got < 0) return -errno;
  atomic_fetch_add(&reads, 1);
  atomic_fetch_add(&read_bytes, got);
  return (int)got;
}

static int slow_release(const char *name, struct fuse_file_info *file) {
  (void)name;
  close((int)file->fh);
  return 0;
}

static void slow_destroy(void *data) {
  (void)data;
  FILE *file = fopen(counts, "w");
  if (!file) return;
  fprintf(file, "%ld %ld %ld\n", atomic_load(&reads), atomic_load(&read_bytes), atomic_load(&metadata));
  fclose(file);
}

static const struct fuse_operations operations = {
    .init = slow_init,
    .getattr = slow_getattr,
    .readlink = slow_readlink,
    .readdir = slow_readdir,
    .open = slow_open,
    .read = slow_read,
    .release = slow_release,
    .destroy = slow_destroy,
};

int main(int argc, char **argv) {
  if (argc < 8) return 2;
  source = argv[1];
  read_us = atol(argv[2]);
  metadata_us = atol(argv[3]);
  background = (unsigned)atoi(argv[4]);
  counts = argv[5];
  argv[5] = argv[0];
  return fuse_main(argc - 5, argv + 5, &operations, NULL);
}
