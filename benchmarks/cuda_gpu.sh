#!/usr/bin/env bash
# Build, check and time the CUDA GEAR cache on a machine with an NVIDIA GPU, and print one table.
#
#     benchmarks/cuda_gpu.sh carry SDIST     at home: put what a GPU machine that reaches nothing needs into .gpu/ (6 MB). SDIST: an unpacked sdist of
#                                            llama-cpp-python (the one installed), whose vendored llama.cpp is used
#     benchmarks/cuda_gpu.sh [STAGE...]      there: the stages named, or all of them; results go to $OUT (default ./gpu-results) as they are made
#
# Needs there: nvcc, cmake, ninja or make, a C++ compiler, python3 with numpy; compute-sanitizer is used where it is found. Carry the
# folder .gpu, which git ignores. Only the architecture at hand is compiled. Stages, each with its own time limit, in order:
#
#     facts       the GPU, driver, compilers                                                                        10 s
#     kernels     gearcpp with its CUDA kernels and tests                                                           4 min
#     tests       the cases of native/tests/cuda_cases.h on the GPU                                                 2 min
#     sanitizer   compute-sanitizer: memcheck and racecheck over a few cases                                        3 min
#     llama       llama.cpp for CUDA from the sdist; the longest: about 5 minutes on 16 cores                       9 min
#     probe       segments with events against one graph, and one outer capture (cuda_gpu_probe.cu)                 1 min
#     attention   attention alone, and the copy bandwidth                                                           4 min
#     model       a model of Llama-3-8B's shape with random weights                                                 2 min
#     check       end to end: llama-bench on GEAR0, perplexity under f16 and GEAR                                   3 min
#     decode      whole decode and prompts, batch 1, 4, 16, against f16, q8_0, q4_0, with peak VRAM                 9 min
#     budget      largest context and largest batch in a budget of GPU memory, and tokens per second there          6 min
#     table       what was measured, as one table                                                                   10 s
#
# All of it takes some 40 minutes at most. Where a command may take 10 and the machine is kept warm between commands (build folders then stay):
#     cuda_gpu.sh facts kernels tests sanitizer llama          then   cuda_gpu.sh probe attention model check table          then   cuda_gpu.sh decode table
# GEARCPP_GPU_SHARE=0.5 halves every limit. A stage that runs out of time leaves what it has written.
#
# GEARCPP_CUDA=1 is set here: the wrapper is opt-in until this script has shown it to be right.
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD
out=${OUT:-$root/gpu-results}
work=${GEARCPP_GPU_WORK:-$root/.gpu-work} # not in .gpu: what is carried replaces what is there
share=${GEARCPP_GPU_SHARE:-1}
jobs=$(nproc)

if [ "${1:-}" = carry ]; then
    source=${2:?"carry wants the folder of an unpacked llama-cpp-python sdist"}/vendor/llama.cpp
    [ -d "$source/ggml" ] || { echo "no vendored llama.cpp in $source" >&2; exit 1; }
    mkdir -p .gpu
    tar -C "$source" -czf .gpu/llama.tgz --exclude='*.md' CMakeLists.txt LICENSE licenses cmake ggml src include common vendor scripts tools
    python3 -m pip download -q --no-deps --only-binary=:all: -d .gpu gguf || echo "without gguf: the stages from model on will be left out" >&2
    ls -l .gpu
    exit 0
fi

mkdir -p "$out" "$work"
log=$out/log.txt
export GEARCPP_CUDA=1
gear=$work/gear
llama=$work/llama-build
bin=$llama/bin

note() { printf '%s %s\n' "$(date -u +%T)" "$*" | tee -a "$log"; }

# stage NAME SECONDS: runs stage_NAME within the limit; what it prints goes to the log, its last lines to the screen. A stage that fails stops no other.
stage() {
    local name=$1 limit status
    limit=$(awk -v s="$2" -v f="$share" 'BEGIN { printf "%d", s * f }')
    note "== $name (at most $limit s)"
    timeout --kill-after=10 "$limit" bash -c "$(declare -f "stage_$name" run_bench note); log='$log'; out='$out'; work='$work'; gear='$gear'; llama='$llama'; \
bin='$bin'; root='$root'; jobs='$jobs'; set -e; stage_$name" >"$out/$name.txt" 2>&1
    status=$?
    tail -n 6 "$out/$name.txt"
    cat "$out/$name.txt" >>"$log"
    note "== $name: status $status"
    echo "{\"what\": \"stage\", \"name\": \"$name\", \"status\": $status}" >>"$out/stages.jsonl"
}

stage_facts() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv,noheader
    nvcc --version | tail -n 2
    cmake --version | head -n 1
    git -C "$root" rev-parse HEAD 2>/dev/null || true
    nproc
}

stage_kernels() {
    arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
    cmake -S "$root" -B "$gear" -DCMAKE_BUILD_TYPE=Release -DGEARCPP_TESTS=ON -DGEARCPP_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="$arch-real"
    cmake --build "$gear" -j "$jobs" --target gearcpp gearcpp-cuda cuda_device_tests
}

stage_tests() { "$gear/cuda_device_tests" "$gear/libgearcpp-cuda.so"; }

stage_sanitizer() {
    command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer here"; return 1; }
    compute-sanitizer --tool memcheck --error-exitcode 9 "$gear/cuda_device_tests" "$gear/libgearcpp-cuda.so" quick
    compute-sanitizer --tool racecheck --error-exitcode 9 "$gear/cuda_device_tests" "$gear/libgearcpp-cuda.so" quick
}

stage_llama() {
    arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
    if [ ! -d "$work/llama" ]; then
        mkdir -p "$work/llama"
        tar -C "$work/llama" -xzf "$root/.gpu/llama.tgz"
    fi
    # cuBLAS and the driver's library may lie outside of the toolkit: in PyTorch's wheels, in the driver's folder.
    options=()
    places=("$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")" /usr/local/cuda /usr/local/nvidia /usr/lib/x86_64-linux-gnu
        "$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/nvidia")
    find_file() { find -L "${places[@]}" -name "$1" 2>/dev/null | head -n 1; }
    mkdir -p "$work/lib"
    for name in cublas cublasLt; do
        file=$(find_file "lib$name.so*")
        [ -n "$file" ] && ln -sf "$file" "$work/lib/lib$name.so" && options+=("-DCUDA_${name}_LIBRARY=$work/lib/lib$name.so")
    done
    header=$(find_file cublas_v2.h)
    [ -n "$header" ] && options+=("-DCMAKE_CUDA_FLAGS=-I$(dirname "$header")" "-DCMAKE_CXX_FLAGS=-I$(dirname "$header")")
    driver=$(find_file 'libcuda.so*')
    if [ -n "$driver" ]; then options+=("-DCUDA_cuda_driver_LIBRARY=$driver"); else options+=(-DGGML_CUDA_NO_VMM=ON); fi
    echo "found: ${options[*]}"
    cmake -S "$work/llama" -B "$llama" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="$arch-real" \
        -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_UI=OFF \
        -DLLAMA_BUILD_APP=OFF "${options[@]}"
    cmake --build "$llama" -j "$jobs" --target llama-bench llama-batched-bench llama-perplexity
}

stage_probe() {
    nvcc -std=c++17 -O2 -arch=native -I "$work/llama/ggml/include" -I "$work/llama/ggml/src" "$root/benchmarks/cuda_gpu_probe.cu" -o "$work/probe" \
        -L"$bin" -lggml -lggml-base -lggml-cuda -Xlinker -rpath,"$bin"
    rm -f "$out/probe.jsonl"
    "$work/probe" "$out/probe.jsonl"
    GGML_CUDA_DISABLE_GRAPHS=1 "$work/probe" "$out/probe.jsonl"
}

stage_attention() {
    objects=$(find "$gear/CMakeFiles/gearcpp-objects.dir" -name '*.o')
    # shellcheck disable=SC2086
    c++ -std=c++17 -O2 -I "$root/native" -I "$root/native/include" -I "$work/llama/ggml/include" "$root/benchmarks/cuda_gpu_attention.cpp" $objects \
        -o "$work/attention" -L"$bin" -lggml -lggml-base -lggml-cuda -Wl,-rpath,"$bin" -lpthread -ldl
    "$work/attention" "$gear/libgearcpp-cuda.so" "$out/attention.jsonl" "${GEARCPP_GPU_ATTENTION_SECONDS:-180}"
}

stage_model() {
    python3 -m pip install -q --no-index --no-deps --target "$work/site" "$root"/.gpu/gguf-*.whl
    PYTHONPATH=$work/site python3 "$root/benchmarks/cuda_gpu.py" model "$work/llama-8b.gguf" llama-8b
    PYTHONPATH=$work/site python3 "$root/benchmarks/cuda_gpu.py" model "$work/qwen3-8b-like.gguf" qwen3-8b-like
}

# run_bench FILE EXTRA DEVICE TYPE NAME ARGUMENTS...: llama-batched-bench with one kind of cache, while the memory in use is watched. A line for each
# measurement goes to FILE, with the JSON members EXTRA ("" or '"a": 1, ').
run_bench() {
    local file=$1 extra=$2 device=$3 type=$4 name=$5 status=0
    shift 5
    nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits -lms 100 >"$work/memory.txt" &
    local watcher=$!
    GGML_BACKEND_PATH=$gear/libgearcpp.so timeout "${GEARCPP_GPU_BENCH_SECONDS:-120}" "$bin/llama-batched-bench" -dev "$device" -ngl 99 -fa on -ctk "$type" \
        -ctv "$type" --output-format jsonl "$@" >"$work/bench.jsonl" 2>&1 || status=$?
    kill "$watcher"
    wait "$watcher" 2>/dev/null || true
    [ "$status" = 0 ] || { echo "$name $*: status $status"; tail -n 3 "$work/bench.jsonl"; }
    python3 "$root/benchmarks/cuda_gpu.py" bench "$name" "$work/bench.jsonl" "$work/memory.txt" "$extra" "$*" >>"$file"
    return $((status != 0))
}

stage_check() {
    export GGML_BACKEND_PATH=$gear/libgearcpp.so
    "$bin/llama-bench" -m "$work/llama-8b.gguf" -dev CUDA0 -ngl 99 -fa 1 -p 512 -n 16 -d 0,2048 -r 1
    "$bin/llama-bench" -m "$work/llama-8b.gguf" -dev GEAR0 -ngl 99 -fa 1 -p 512 -n 16 -d 0,2048 -r 1
    cat "$root"/docs/*.md "$root"/native/*/*.h >"$work/text.txt"
    model=$root/gearcpp/models/books-6m-q8_0.gguf # a trained model: its perplexities must agree to a few parts in a thousand, whatever the text
    for device in CUDA0 GEAR0; do
        "$bin/llama-perplexity" -m "$model" -dev "$device" -ngl 99 -fa on -c 4096 -b 4096 -ub 512 --chunks 4 -f "$work/text.txt"
    done
}

stage_decode() {
    file=$out/decode.jsonl
    rm -f "$file"
    for case in "CUDA0 f16 f16" "GEAR0 f16 gear" "CUDA0 q8_0 q8_0" "CUDA0 q4_0 q4_0"; do
        for model in llama-8b qwen3-8b-like; do
            # shellcheck disable=SC2086
            run_bench "$file" "" $case -m "$work/$model.gguf" -c 36864 -b 2048 -ub 512 -npp 128,4096,32768 -ntg 64 -npl 1 || true
        done
        # shellcheck disable=SC2086
        run_bench "$file" "" $case -m "$work/llama-8b.gguf" -c 67584 -b 2048 -ub 512 -npp 128,4096 -ntg 64 -npl 4,16 || true
    done
    for case in "CUDA0 f16 f16" "GEAR0 f16 gear" "CUDA0 q4_0 q4_0"; do
        # shellcheck disable=SC2086
        run_bench "$file" "" $case -m "$work/llama-8b.gguf" -c 131072 -b 2048 -ub 512 -npp 130000 -ntg 64 -npl 1 || true
    done
}

# The rest of the GPU's memory is taken by another process, so that the budget is what a smaller GPU has.
stage_budget() {
    file=$out/budget.jsonl
    rm -f "$file"
    python3 "$root/benchmarks/cuda_gpu.py" ballast "${GEARCPP_GPU_BUDGET_GIB:-16}" &
    ballast=$!
    trap 'kill $ballast' EXIT
    sleep 10
    for case in "CUDA0 f16 f16" "GEAR0 f16 gear"; do
        for n in 32768 49152 65536 98304 131072 196608 262144; do # one sequence in an ever longer context, until it does not fit
            # shellcheck disable=SC2086
            run_bench "$file" "\"budget\": \"context\", \"n_ctx\": $n, " $case -m "$work/llama-8b.gguf" -c "$n" -b 512 -ub 512 -npp 512 -ntg 32 -npl 1 || break
        done
        for n in 8 16 24 32 48 64; do # ever more sequences of some 2000 tokens
            # shellcheck disable=SC2086
            run_bench "$file" "\"budget\": \"batch\", \"n_ctx\": $((n * 2304)), " $case -m "$work/llama-8b.gguf" -c $((n * 2304)) -b 512 -ub 512 -npp 2048 -ntg 64 \
                -npl "$n" || break
        done
    done
}

stage_table() { python3 "$root/benchmarks/cuda_gpu.py" table "$out" | tee "$out/table.md"; }

declare -A limits=([facts]=10 [kernels]=240 [tests]=120 [sanitizer]=180 [llama]=540 [probe]=60 [attention]=240 [model]=120 [check]=180 [decode]=540
    [budget]=360 [table]=10)
order=(facts kernels tests sanitizer llama probe attention model check decode budget table)
[ $# -gt 0 ] && order=("$@")
for name in "${order[@]}"; do
    [ -n "${limits[$name]:-}" ] || { echo "no stage $name" >&2; exit 2; }
    stage "$name" "${limits[$name]}"
done
