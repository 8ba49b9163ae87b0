/* An MPI's all-reduce, timed as `reducer bench` times everybody's (rank.py): float32, sum, in
 * place, call after call on as many buffers as fit 32 MiB, without a barrier between them, after
 * one that is not timed: it makes the connections, as a torch group's first calls do.
 *
 *   mpirun -n RANKS mpi_allreduce BYTES ITERATIONS
 *
 * Prints how many results were wrong, then the ns of each iteration's slowest rank. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

static const size_t kPoolBytes = (size_t)32 << 20;

/* Depends on the position, so that a chunk in a wrong place is seen; sums of it are exact. */
static float value(float first, float step, size_t i) { return first + step * (float)(i % 1001); }

int main(int argc, char** argv) {
  int rank, n;
  MPI_Init(&argc, &argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &n);
  if (argc != 3) MPI_Abort(MPI_COMM_WORLD, 2);
  const int iterations = atoi(argv[2]);
  size_t count = strtoull(argv[1], NULL, 10) / sizeof(float);
  if (count == 0) count = 1;
  size_t slots = kPoolBytes / (count * sizeof(float));
  if (slots < 1) slots = 1;
  if (slots > (size_t)iterations) slots = (size_t)iterations;
  float* data = malloc(slots * count * sizeof(float));
  double* times = malloc(sizeof(double) * (size_t)iterations);
  double* slowest = malloc(sizeof(double) * (size_t)iterations);
  const float mine = (float)(rank + 1), sum = (float)n * (float)(n + 1) / 2;
  int wrong = 0, all_wrong = 0;
  for (size_t i = 0; i < count; ++i) data[i] = value(mine, 1, i);
  MPI_Allreduce(MPI_IN_PLACE, data, (int)count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
  for (int done = 0; done < iterations;) {
    const int used = iterations - done < (int)slots ? iterations - done : (int)slots;
    for (size_t i = 0; i < (size_t)used * count; ++i) data[i] = value(mine, 1, i % count);
    int aligner = 0;
    MPI_Allreduce(MPI_IN_PLACE, &aligner, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
    for (int slot = 0; slot < used; ++slot) {
      const double begun = MPI_Wtime();
      MPI_Allreduce(MPI_IN_PLACE, data + (size_t)slot * count, (int)count, MPI_FLOAT, MPI_SUM,
                    MPI_COMM_WORLD);
      times[done + slot] = MPI_Wtime() - begun;
    }
    for (int slot = 0; slot < used; ++slot) {
      size_t bad = 0;
      for (size_t i = 0; i < count; ++i)
        bad += data[(size_t)slot * count + i] != value(sum, (float)n, i);
      wrong += bad > 0;
    }
    done += used;
  }
  MPI_Reduce(times, slowest, iterations, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
  MPI_Reduce(&wrong, &all_wrong, 1, MPI_INT, MPI_SUM, 0, MPI_COMM_WORLD);
  if (rank == 0) {
    printf("%d\n", all_wrong);
    for (int i = 0; i < iterations; ++i) printf("%.0f\n", slowest[i] * 1e9);
  }
  MPI_Finalize();
  return 0;
}
