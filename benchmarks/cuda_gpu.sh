#!/usr/bin/env bash
# Build, check and time the CUDA GEAR cache on a machine with an NVIDIA GPU, and print one table.
#
#     benchmarks/cuda_gpu.sh carry SDIST     at home: put what a GPU machine that reaches nothing needs into .gpu/ (10 MB). SDIST: an unpacked sdist of
#                                            llama-cpp-python (the one installed), whose vendored llama.cpp is used
#     benchmarks/cuda_gpu.sh [STAGE...]      there: the stages named, or all of them, within GEARCPP_GPU_SECONDS (default 570)
#     benchmarks/cuda_gpu.sh keep FOLDER     at home: put what came back in FOLDER into .gpu/, so that the next call goes on where this one stopped
#
# Needs there: nvcc, cmake, ninja or make, a C++ compiler, python3 with numpy; compute-sanitizer and zstd are used where they are found. Carry the folder
# .gpu, which git ignores. Only the architecture at hand is compiled. llama.cpp, the longest to build, is built in the background from the start.
#
#     stage       what it does                                                              limit   and not begun with fewer seconds left than
#     facts       the GPU, driver, compilers; llama.cpp's build begins                       15 s      5
#     kernels     gearcpp with its CUDA kernels and tests                                   240 s     30
#     tests       the cases of native/tests/cuda_cases.h on the GPU                         120 s     15
#     sanitizer   compute-sanitizer: memcheck and racecheck over a few cases                150 s     60    as long as llama.cpp is being built
#     llama       waits for llama.cpp; packs it up for a later call                         all of it 20
#     check       end to end with a real model: perplexity on f16 and on GEAR               100 s     20
#     probe       segments with events against one graph, and one outer capture              60 s     20
#     attention   attention alone, the most important cases first, and the copy bandwidth   150 s     30
#     model       models of Llama-3-8B's and Qwen3-8B's shape with random weights            90 s     40
#     decode      whole decode and prompts, batch 1, 4, 16, against f16, q8_0, q4_0         540 s     40    case by case
#     budget      largest context and batch in a budget of GPU memory                       360 s     60    case by case
#     table       what was measured, as one table                                            10 s      0
#
# $OUT (default ./gpu-results) gets log.txt, results.jsonl, table.md as they are made, and the built llama.cpp in pieces of 15 MiB: 8 files at most. A
# stage that results.jsonl says was done is not done again; what did not fit is a line that says so, and is done by the next call. After a change of the
# code remove .gpu/results.jsonl (and gpu-results, if that is $OUT), so that all is measured anew.
#
# GEARCPP_CUDA=1 is set here: the GEAR cache on a GPU is opt-in until this script has shown it to be right.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
export root=$PWD
export out=${OUT:-$root/gpu-results}
export work=${GEARCPP_GPU_WORK:-$root/.gpu-work} # not in .gpu: what is carried replaces what is there
export seconds=${GEARCPP_GPU_SECONDS:-570}
export started=${started:-$(date +%s)} # of the call, for stages too
export gear=$work/gear llama=$work/llama-build
export bin=$llama/bin results=$out/results.jsonl log=$out/log.txt
jobs=$(nproc)
most_pieces=4
export stage_seconds=${stage_seconds:-0} # of the stage that this process is
export GEARCPP_CUDA=1

left() { echo $((started + seconds - $(date +%s))); }
note() { printf '%s %s\n' "$(date -u +%T)" "$*" | tee -a "$log"; }
# in_results TEXT...: whether a line of the results has all of these
in_results() {
    local lines text
    [ -f "$results" ] || return 1
    lines=$(cat "$results")
    for text in "$@"; do lines=$(grep -F -e "$text" <<<"$lines") || return 1; done
}
architecture() { nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .; }

# ---------------------------------------------------------------------------------------------------------------------------------------------
# At home
# ---------------------------------------------------------------------------------------------------------------------------------------------

carry() {
    local source=${1:?"carry wants the folder of an unpacked llama-cpp-python sdist"}/vendor/llama.cpp
    [ -d "$source/ggml" ] || { echo "no vendored llama.cpp in $source" >&2; exit 1; }
    mkdir -p .gpu
    tar -C "$source" -czf .gpu/llama.tgz --exclude='*.md' CMakeLists.txt LICENSE licenses cmake ggml src include common vendor scripts tools
    python3 -m pip download -q --no-deps --only-binary=:all: -d .gpu gguf || echo "without gguf: the stages from model on will be left out" >&2
    ls -l .gpu
}

keep() {
    local from=${1:?"keep wants the folder that came back"}
    [ -f "$from/results.jsonl" ] || { echo "no results.jsonl in $from" >&2; exit 1; }
    mkdir -p .gpu
    cp "$from/results.jsonl" .gpu/
    if compgen -G "$from/llama-*.pack.*" >/dev/null; then
        rm -f .gpu/llama-*.pack.*
        cp "$from"/llama-*.pack.* .gpu/
    fi
    chmod -R u+w .gpu
    du -sh .gpu
}

# ---------------------------------------------------------------------------------------------------------------------------------------------
# llama.cpp
# ---------------------------------------------------------------------------------------------------------------------------------------------

# What an earlier call sent home: libraries and programs, or the objects of a build that was not finished.
unpack_llama() {
    local kind
    for kind in 'done' part; do
        if compgen -G "$root/.gpu/llama-$kind.pack.*" >/dev/null && [ ! -d "$llama" ]; then
            mkdir -p "$llama"
            cat "$root/.gpu/llama-$kind.pack."* | zstd -dc -q | tar -C "$llama" -x || rm -rf "$llama"
            echo "unpacked: llama-$kind"
        fi
    done
}

pack_llama() { # done bin | part CMakeFiles ggml ...
    local kind=$1
    shift
    command -v zstd >/dev/null || { echo "no zstd: llama.cpp is not sent home"; return 0; }
    rm -f "$out"/llama-*.pack.*
    tar -C "$llama" -c "$@" | zstd -q -T0 -6 | split -b 15M -a 1 - "$out/llama-$kind.pack."
    if [ "$(find "$out" -name 'llama-*.pack.*' | wc -l)" -gt "$most_pieces" ]; then
        echo "llama.cpp is larger than $most_pieces pieces of 15 MiB: not sent home"
        rm -f "$out"/llama-*.pack.*
    fi
}

# cuBLAS and the driver's library may lie outside of the toolkit: in PyTorch's wheels, in the driver's folder.
build_llama() {
    local options=() places name file header driver
    mkdir -p "$work/lib"
    if [ ! -d "$work/llama" ]; then
        mkdir -p "$work/llama"
        tar -C "$work/llama" -xzf "$root/.gpu/llama.tgz"
    fi
    unpack_llama
    if [ -x "$bin/llama-perplexity" ] && [ -f "$bin/complete" ]; then
        return 0
    fi
    places=("$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")" /usr/local/cuda /usr/local/nvidia /usr/lib/x86_64-linux-gnu
        "$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/nvidia")
    find_file() { find -L "${places[@]}" -name "$1" 2>/dev/null | head -n 1; }
    for name in cublas cublasLt; do
        file=$(find_file "lib$name.so*")
        if [ -n "$file" ]; then
            ln -sf "$file" "$work/lib/lib$name.so"
            ln -sf "$file" "$work/lib/$(basename "$file")" # by this name the loader looks for it
            options+=("-DCUDA_${name}_LIBRARY=$work/lib/lib$name.so")
        fi
    done
    header=$(find_file cublas_v2.h)
    [ -n "$header" ] && options+=("-DCMAKE_CUDA_FLAGS=-I$(dirname "$header")" "-DCMAKE_CXX_FLAGS=-I$(dirname "$header")")
    driver=$(find_file 'libcuda.so*')
    if [ -n "$driver" ]; then options+=("-DCUDA_cuda_driver_LIBRARY=$driver"); else options+=(-DGGML_CUDA_NO_VMM=ON); fi
    command -v ninja >/dev/null && options+=(-G Ninja)
    echo "found: ${options[*]}"
    # No NCCL, no server, no examples; attention for equal types of K and V only, which is what is measured.
    cmake -S "$work/llama" -B "$llama" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="$(architecture)-real" \
        -DGGML_CUDA_FA_ALL_QUANTS=OFF -DGGML_CUDA_NCCL=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
        -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_BUILD_APP=OFF "${options[@]}" &&
        cmake --build "$llama" -j "$jobs" --target llama-bench llama-batched-bench llama-perplexity &&
        touch "$bin/complete"
}

# ---------------------------------------------------------------------------------------------------------------------------------------------
# Stages. Each is a process of its own, under set -e; what it prints goes to the log.
# ---------------------------------------------------------------------------------------------------------------------------------------------

stage_facts() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv,noheader
    nvcc --version | tail -n 2
    cmake --version | head -n 1
    python3 --version
    git -C "$root" rev-parse HEAD 2>/dev/null || true
    nproc
}

stage_kernels() {
    cmake -S "$root" -B "$gear" -DCMAKE_BUILD_TYPE=Release -DGEARCPP_TESTS=ON -DGEARCPP_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="$(architecture)-real"
    cmake --build "$gear" -j "$jobs" --target gearcpp gearcpp-cuda cuda_device_tests
}

stage_tests() { "$gear/cuda_device_tests" "$gear/libgearcpp-cuda.so"; }

stage_sanitizer() {
    command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer here"; return 1; }
    compute-sanitizer --tool memcheck --error-exitcode 9 "$gear/cuda_device_tests" "$gear/libgearcpp-cuda.so" quick
    compute-sanitizer --tool racecheck --error-exitcode 9 "$gear/cuda_device_tests" "$gear/libgearcpp-cuda.so" quick
}

stage_llama() { # the build itself runs beside the stages before this one
    while [ ! -f "$work/llama.status" ]; do sleep 1; done
    tail -n 5 "$work/llama.txt"
    [ "$(cat "$work/llama.status")" = 0 ]
    ls -l "$bin"/*.so
    compgen -G "$root/.gpu/llama-done.pack.*" >/dev/null || pack_llama "done" bin
}

stage_check() {
    export GGML_BACKEND_PATH=$gear/libgearcpp.so
    find "$root/docs" "$root/native" \( -name '*.md' -o -name '*.h' -o -name '*.cuh' \) -exec cat {} + >"$work/text.txt"
    model=$root/gearcpp/models/books-6m-q8_0.gguf # a trained model: its perplexities must agree to a few parts in a thousand, whatever the text
    devices=(CUDA0 GEAR0)
    if [ "$(nvidia-smi -L | wc -l)" -gt 1 ]; then # layers over two GPUs, in pipelines of llama.cpp's
        devices+=(GEAR0,GEAR1)
    else
        echo "layers split over two GPUs: not checked, there is one GPU here"
    fi
    for device in "${devices[@]}"; do
        "$bin/llama-perplexity" -m "$model" -dev "$device" -ngl 99 -fa on -c 4096 -b 4096 -ub 512 --chunks 4 -f "$work/text.txt" 2>&1 | tee "$work/perplexity.txt"
        python3 "$root/benchmarks/cuda_gpu.py" perplexity "$device" "$work/perplexity.txt" >>"$results"
    done
    python3 "$root/benchmarks/cuda_gpu.py" agree "$results"
    for device in CUDA0 GEAR0; do
        "$bin/llama-bench" -m "$model" -dev "$device" -ngl 99 -fa 1 -p 512 -n 16 -d 0,2048 -r 1
    done
}

stage_probe() {
    nvcc -std=c++17 -O2 -arch=native -I "$work/llama/ggml/include" -I "$work/llama/ggml/src" "$root/benchmarks/cuda_gpu_probe.cu" -o "$work/probe" \
        -L"$bin" -lggml -lggml-base -lggml-cuda -Xlinker -rpath,"$bin"
    "$work/probe" "$results"
    GGML_CUDA_DISABLE_GRAPHS=1 "$work/probe" "$results"
}

stage_attention() {
    objects=$(find "$gear/CMakeFiles/gearcpp-objects.dir" -name '*.o')
    # shellcheck disable=SC2086
    c++ -std=c++17 -O2 -I "$root/native" -I "$root/native/include" -I "$work/llama/ggml/include" "$root/benchmarks/cuda_gpu_attention.cpp" $objects \
        -o "$work/attention" -L"$bin" -lggml -lggml-base -lggml-cuda -Wl,-rpath,"$bin" -lpthread -ldl
    "$work/attention" "$gear/libgearcpp-cuda.so" "$results" "$((stage_seconds - 15))"
}

stage_model() {
    python3 -m pip install -q --no-index --no-deps --target "$work/site" "$root"/.gpu/gguf-*.whl
    for shape in llama-8b qwen3-8b-like; do
        [ -f "$work/$shape.gguf" ] || PYTHONPATH=$work/site python3 "$root/benchmarks/cuda_gpu.py" model "$work/$shape.gguf" "$shape"
    done
}

# run_bench WHAT EXTRA DEVICE TYPE NAME ARGUMENTS...: llama-batched-bench with one kind of cache, while the memory in use is watched. A line for each
# measurement goes to the results, with the JSON members EXTRA ("" or '"a": 1, '). A case that is there already is not run again.
run_bench() {
    local what=$1 extra=$2 device=$3 type=$4 name=$5 status=0 case limit
    shift 5
    case="$name ${*##*/}"
    if in_results "\"case\"" "\"$what: $case\""; then
        return 0
    fi
    limit=$((stage_seconds - SECONDS - 5))
    if [ "$limit" -lt 15 ]; then
        echo "skipped for want of time: $case"
        skipped=1
        return 0
    fi
    nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits -lms 100 >"$work/memory.txt" &
    local watcher=$!
    GGML_BACKEND_PATH=$gear/libgearcpp.so timeout "$limit" "$bin/llama-batched-bench" -dev "$device" -ngl 99 -fa on -ctk "$type" -ctv "$type" \
        --output-format jsonl "$@" >"$work/bench.jsonl" 2>&1 || status=$?
    kill "$watcher"
    wait "$watcher" 2>/dev/null || true
    [ "$status" = 0 ] || { echo "$case: status $status"; tail -n 3 "$work/bench.jsonl"; }
    python3 "$root/benchmarks/cuda_gpu.py" bench "$name" "$work/bench.jsonl" "$work/memory.txt" "\"what\": \"$what\", $extra" "$*" >>"$results"
    if [ "$status" = 124 ]; then
        skipped=1
    else
        echo "{\"what\": \"case\", \"name\": \"$what: $case\", \"status\": $status}" >>"$results"
    fi
    return $((status != 0))
}

stage_decode() {
    skipped=0
    for case in "CUDA0 f16 f16" "GEAR0 f16 gear" "CUDA0 q4_0 q4_0" "CUDA0 q8_0 q8_0"; do # the question of this project first
        # shellcheck disable=SC2086
        run_bench decode "" $case -m "$work/llama-8b.gguf" -c 36864 -b 2048 -ub 512 -npp 128,4096,32768 -ntg 64 -npl 1 || true
    done
    for case in "CUDA0 f16 f16" "GEAR0 f16 gear" "CUDA0 q4_0 q4_0"; do
        # shellcheck disable=SC2086
        run_bench decode "" $case -m "$work/llama-8b.gguf" -c 67584 -b 2048 -ub 512 -npp 128,4096 -ntg 64 -npl 4,16 || true
        # shellcheck disable=SC2086
        run_bench decode "" $case -m "$work/llama-8b.gguf" -c 131072 -b 2048 -ub 512 -npp 130000 -ntg 64 -npl 1 || true
        # shellcheck disable=SC2086
        run_bench decode "" $case -m "$work/qwen3-8b-like.gguf" -c 36864 -b 2048 -ub 512 -npp 128,4096,32768 -ntg 64 -npl 1 || true
    done
    return "$skipped"
}

# The rest of the GPU's memory is taken by another process, so that the budget is what a smaller GPU has.
stage_budget() {
    skipped=0
    python3 "$root/benchmarks/cuda_gpu.py" ballast "${GEARCPP_GPU_BUDGET_GIB:-16}" &
    ballast=$!
    trap 'kill $ballast 2>/dev/null || true' EXIT
    sleep 10
    kill -0 "$ballast" || { echo "no ballast: there is no budget to measure in"; return 1; }
    for case in "CUDA0 f16 f16" "GEAR0 f16 gear"; do
        for n in 32768 49152 65536 98304 131072 196608 262144; do # one sequence in an ever longer context, until it does not fit
            # shellcheck disable=SC2086
            run_bench budget "\"budget\": \"context\", \"n_ctx\": $n, " $case -m "$work/llama-8b.gguf" -c "$n" -b 512 -ub 512 -npp 512 -ntg 32 -npl 1 || break
        done
        for n in 8 16 24 32 48 64; do # ever more sequences of some 2000 tokens
            # shellcheck disable=SC2086
            run_bench budget "\"budget\": \"batch\", \"n_ctx\": $((n * 2304)), " $case -m "$work/llama-8b.gguf" -c $((n * 2304)) -b 512 -ub 512 -npp 2048 -ntg 64 \
                -npl "$n" || break
        done
    done
    return "$skipped"
}

# ---------------------------------------------------------------------------------------------------------------------------------------------
# The order of things
# ---------------------------------------------------------------------------------------------------------------------------------------------

case "${1:-}" in
carry | keep)
    "$@"
    exit
    ;;
--stage) # of this script itself
    set -e
    "stage_$2"
    exit
    ;;
esac

declare -A limits=([facts]=15 [kernels]=240 [tests]=120 [sanitizer]=150 [llama]=9999 [check]=100 [probe]=60 [attention]=150 [model]=90 [decode]=540
    [budget]=360) needs=([facts]=5 [kernels]=30 [tests]=15 [sanitizer]=60 [llama]=20 [check]=20 [probe]=20 [attention]=30 [model]=40 [decode]=40 [budget]=60)
order=(facts kernels tests sanitizer llama check probe attention model decode budget)
[ $# -gt 0 ] && order=("$@")
for name in "${order[@]}"; do
    [ "$name" = table ] || [ -n "${limits[$name]:-}" ] || { echo "no stage $name" >&2; exit 2; }
done
for need in nvidia-smi nvcc cmake python3 c++ timeout; do
    command -v "$need" >/dev/null || { echo "no $need here: this script is for a machine with an NVIDIA GPU and a CUDA toolkit" >&2; exit 2; }
done

mkdir -p "$out" "$work/lib"
export LD_LIBRARY_PATH=$bin:$work/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
[ -f "$results" ] || { [ -f .gpu/results.jsonl ] && cp .gpu/results.jsonl "$results"; }
touch "$results"

builder=
finish() {
    trap - EXIT TERM INT
    if [ -n "$builder" ] && kill -0 "$builder" 2>/dev/null; then # not finished: send home what there is
        kill -- "-$builder" 2>/dev/null
        wait "$builder" 2>/dev/null
        (cd "$llama" 2>/dev/null && pack_llama part CMakeCache.txt CMakeFiles ggml .ninja_log .ninja_deps build.ninja 2>/dev/null) || true
    fi
    python3 benchmarks/cuda_gpu.py table "$results" | tee "$out/table.md"
}
trap finish EXIT
trap 'exit 143' TERM INT

begin_llama() {
    rm -f "$work/llama.status"
    set -m # a process group of its own, to be ended as one
    (
        build_llama >"$work/llama.txt" 2>&1
        echo $? >"$work/llama.status"
    ) &
    builder=$!
    set +m
}
is_built() { [ -f "$work/llama.status" ] && [ "$(cat "$work/llama.status")" = 0 ]; }

# run_stage NAME: within what is left of the call. A stage that fails stops no other, but for those that need what it builds.
run_stage() {
    local name=$1 limit status spare=20 # the end of the call: packing what was built, the table
    if in_results '"what": "stage"' "\"name\": \"$name\", \"status\": 0" && [[ ! $name =~ ^(facts|kernels|llama|model)$ ]]; then
        note "== $name: done by an earlier call"
        return
    fi
    case $name in
    tests | sanitizer | check | attention | decode | budget)
        [ -f "$gear/libgearcpp-cuda.so" ] || { note "== $name: left out, gearcpp's kernels are not built"; return; } ;;&
    check | probe | attention | decode | budget)
        is_built || { note "== $name: left out, llama.cpp is not built"; return; } ;;&
    sanitizer)
        is_built && { note "== $name: left for the end, llama.cpp is ready"; late+=(sanitizer); return; } ;;
    decode | budget)
        [ -f "$work/llama-8b.gguf" ] || { note "== $name: left out, there is no model"; return; } ;;
    esac
    limit=$(($(left) - spare))
    if [ "$limit" -lt "${needs[$name]}" ]; then
        note "== $name: skipped, $limit s are left and it wants ${needs[$name]}"
        echo "{\"what\": \"stage\", \"name\": \"$name\", \"status\": \"skipped\"}" >>"$results"
        return
    fi
    [ "$limit" -gt "${limits[$name]}" ] && limit=${limits[$name]}
    note "== $name (at most $limit s)"
    stage_seconds=$limit timeout --kill-after=5 "$limit" bash "$0" --stage "$name" >"$work/$name.txt" 2>&1
    status=$?
    tail -n 6 "$work/$name.txt"
    cat "$work/$name.txt" >>"$log"
    note "== $name: status $status, $(left) s left"
    echo "{\"what\": \"stage\", \"name\": \"$name\", \"status\": $status}" >>"$results"
}

late=()
if [[ " ${order[*]} " =~ \ (llama|check|probe|attention|decode|budget)\  ]]; then
    if [ -f .gpu/llama.tgz ]; then
        begin_llama
    else
        note "no .gpu/llama.tgz: run 'cuda_gpu.sh carry' at home and carry .gpu"
        echo 1 >"$work/llama.status"
        touch "$work/llama.txt"
    fi
fi
for name in "${order[@]}"; do
    [ "$name" = table ] && continue
    if [[ $name =~ ^(check|probe|attention|decode|budget)$ ]] && [ -n "$builder" ] && [[ ! " ${order[*]} " =~ \ llama\  ]]; then
        wait "$builder"
    fi
    run_stage "$name"
done
for name in "${late[@]}"; do
    rm -f "$work/llama.status"
    run_stage "$name"
done
