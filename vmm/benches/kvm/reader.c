/* The guest's reader of disks: `reader DISK SECONDS` prints how fast it reads
 * the disk past the guest's own cache: in pieces of 1 MiB one after another,
 * in MiB/s, and in pieces of 4 KiB anywhere, in reads/s. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { LARGE = 1 << 20, SMALL = 4096 };

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void read_at(int fd, char *to, size_t len, off_t at)
{
	if (pread(fd, to, len, at) != (ssize_t)len) {
		perror("pread");
		exit(1);
	}
}

int main(int argc, char **argv)
{
	uint64_t random = 88172645463325252ull, count;
	double seconds, begun;
	char *to;
	off_t size, at;
	int fd;

	if (argc != 3 || (fd = open(argv[1], O_RDONLY | O_DIRECT)) < 0 ||
	    posix_memalign((void **)&to, SMALL, LARGE)) {
		perror("reader");
		return 2;
	}
	seconds = atof(argv[2]);
	size = lseek(fd, 0, SEEK_END) / LARGE * LARGE;
	/* Once, so that the host has it all in memory. */
	for (at = 0; at < size; at += LARGE)
		read_at(fd, to, LARGE, at);

	begun = now();
	for (count = at = 0; now() - begun < seconds; count++) {
		read_at(fd, to, LARGE, at);
		at = (at + LARGE) % size;
	}
	printf("sequential %.3f\n", count / (now() - begun));

	begun = now();
	for (count = 0; now() - begun < seconds; count++) {
		random ^= random << 13;
		random ^= random >> 7;
		random ^= random << 17;
		read_at(fd, to, SMALL, random % (size / SMALL) * SMALL);
	}
	printf("random %.3f\n", count / (now() - begun));
	return 0;
}
