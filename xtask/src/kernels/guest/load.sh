#!/bin/bash
# Does everything load, attach and go away again?
set -eu
mkdir -p policies
cat > load.yaml <<C
trustDomain: example.org
stateDir: /run/kernels/state
node: {bpffs: /sys/fs/bpf/load}
workloads: [{name: web, cgroup: /kernels-web}]
enforcedParents: [/kernels-jobs]
policies: {folder: policies}
admin: {socket: /run/kernels/load.socket}
C
"$REEVE" check --config load.yaml
mkdir -p /sys/fs/cgroup/kernels-web
"$REEVE" guard --config load.yaml
ls /sys/fs/bpf/load | tr '\n' ' '
for log in off debug; do
    # With its own log the programs are longer.
    sed "\$a log: {ebpf: $log}" load.yaml > "load-$log.yaml"
    "$REEVE" run --config "load-$log.yaml" > "load-$log.log" 2>&1 &
    for _ in $(seq 300); do
        [ "$(curl -s -o /dev/null -m 2 -w '%{http_code}' http://127.0.0.1:15020/readyz)" = 200 ] && break
        kill -0 $! || { cat "load-$log.log"; exit 1; }
        sleep 0.2
    done
    "$REEVE" status --socket load.socket
    kill $!
    wait $! || { cat "load-$log.log"; exit 1; }
done
"$REEVE" detach --config load.yaml > /dev/null
[ ! -e /sys/fs/bpf/load ]
rmdir /sys/fs/cgroup/kernels-web /sys/fs/cgroup/kernels-jobs
