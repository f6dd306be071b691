"""Products of one linear: the float weight, torch's int4 product and qcore's backends. The same as `qcore bench matmul`.

python benchmarks/matmul.py [--shapes 4096x4096] [--tokens 1,2,4] [--backend cuda] [--bits 4] [--json]
"""

from qcore.cli import bench_matmul

if __name__ == "__main__":
    bench_matmul()
