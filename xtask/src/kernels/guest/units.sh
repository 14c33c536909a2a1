#!/bin/bash
# The shipped units under the guest's own systemd: guard, daemon, reload, restart, crash, stop.
set -u
failed=0
# so WHAT EXPECTED COMMAND…: the last line that the command prints is the expected one.
so() {
    local what=$1 expected=$2 found
    shift 2
    found=$("$@" 2>&1 | tail -n 1)
    if [[ $found == $expected ]]; then
        echo "ok: $what"
    else
        echo "NOT SO: $what: expected $expected, found: $found"
        failed=$((failed + 1))
    fi
}
from_worker() {
    bash -c 'echo $$ > "/sys/fs/cgroup/$0/cgroup.procs"; exec curl -s -o /dev/null -m 5 -w "%{http_code}\n" "$1"' \
        "$(systemctl show -P ControlGroup worker@1)" "$1"
}
job() { systemd-run -q --wait -P "$@"; }
fetch="curl -s -o /dev/null -m 5 -w %{http_code}\n"
active() {
    for _ in $(seq 300); do
        [ "$(systemctl is-active reeve)" = active ] && break
        sleep 0.2
    done
    systemctl show -P ActiveState reeve
}

# A network with a server that some may reach, and an address that may reach nginx here.
ip netns add out
ip link add near type veth peer name far netns out
ip addr add 192.0.2.1/24 dev near
ip link set near up
for address in 192.0.2.2/24 192.0.2.3/24; do ip -n out addr add $address dev far; done
ip -n out link set far up
ip -n out link set lo up
mkdir -p /run/kernels/www
cat > /run/kernels/out.conf <<C
pid /run/kernels/out.pid; error_log /dev/null; events {}
http { access_log off; server { listen 8000; listen 8001; root /run/kernels/www; autoindex on; } }
C
nsenter --net=/run/netns/out nginx -c /run/kernels/out.conf

install -m 755 "$REEVE" /usr/local/bin/reeve
install -m 644 -t /etc/systemd/system /mnt/reeve.service /mnt/reeve-guard.service
mkdir -p /etc/reeve/policies
printf '[Service]\nExecStart=/bin/sleep infinity\n' > /etc/systemd/system/worker@.service
cat > /etc/reeve/reeve.yaml <<C
trustDomain: example.org
workloads:
  - {name: worker, unit: worker@.service}
enforcedParents: [/jobs.slice, /system.slice/system-worker.slice]
policies: {folder: policies}
sandbox: {seccomp: required, landlock: required}
C
systemctl daemon-reload
so "the units name nothing that this systemd does not know" "" \
    bash -c 'systemd-analyze verify --man=no /etc/systemd/system/reeve.service /etc/systemd/system/reeve-guard.service 2>&1 | grep reeve'

echo "the guard alone"
so "the guard starts" success bash -c 'systemctl start reeve-guard; systemctl show -P Result reeve-guard'
so "the enforced parent is there" active systemctl is-active jobs.slice
so "a job below it is refused" 000 job --slice=jobs.slice $fetch http://192.0.2.2:8000/
so "the next one too" 000 job --slice=jobs.slice $fetch http://192.0.2.2:8000/
so "a job elsewhere is not judged" 200 job $fetch http://192.0.2.2:8000/

echo "the daemon"
sed -i 's/^workloads:$/workloads:\n  - {name: front, unit: nginx.service, ports: [80]}/' /etc/reeve/reeve.yaml
cat > /etc/reeve/policies/p.yaml <<C
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: front}
spec:
  workloads: {names: [front]}
  ingress: [{from: [{cidr: 192.0.2.2}], ports: [{port: 80}]}]
---
apiVersion: reeve.dev/v1alpha1
kind: ConnectionPolicy
metadata: {name: worker}
spec:
  workloads: {names: [worker]}
  egress: [{to: [{cidr: 192.0.2.2}], ports: [{port: 8000}]}]
C
systemctl start reeve
so "reeve.service is active" active active
systemctl start nginx worker@1
sleep 3
so "nothing of the sandbox is missing" "" \
    bash -c 'journalctl -o cat -u reeve | grep -E "not filtered|not shut off"'
so "the allowed address reaches nginx" 200 nsenter --net=/run/netns/out $fetch --interface 192.0.2.2 http://192.0.2.1/
so "another one does not" 000 nsenter --net=/run/netns/out $fetch --interface 192.0.2.3 http://192.0.2.1/
export -f from_worker
so "the worker reaches what it may" 200 bash -c 'from_worker http://192.0.2.2:8000/'
so "and nothing else" 000 bash -c 'from_worker http://192.0.2.2:8001/'
so "a job below the enforced parent is refused" 000 job --slice=jobs.slice $fetch http://192.0.2.2:8000/
so "a job elsewhere is not judged" 200 job $fetch http://192.0.2.2:8001/

echo "reload, restart, crash, stop"
sed -i 's/port: 8000/port: 8001/' /etc/reeve/policies/p.yaml
systemctl reload reeve
so "after a reload the worker reaches the other port" 200 bash -c 'from_worker http://192.0.2.2:8001/'
so "and no longer the first" 000 bash -c 'from_worker http://192.0.2.2:8000/'
main=$(systemctl show -P MainPID reeve)
so "it is upgraded" 0 bash -c 'reeve upgrade > /dev/null; echo $?'
so "another process is the service" no bash -c "[ $main = \$(systemctl show -P MainPID reeve) ] && echo yes || echo no"
so "it is active" active active
so "after an upgrade the worker reaches what it may" 200 bash -c 'from_worker http://192.0.2.2:8001/'
systemctl restart reeve
so "it restarts" active active
so "after a restart the worker reaches what it may" 200 bash -c 'from_worker http://192.0.2.2:8001/'
kill -9 "$(systemctl show -P MainPID reeve)"
so "while it is down the worker is refused the rest" 000 bash -c 'from_worker http://192.0.2.2:8000/'
sleep 2
so "it comes back by itself" active active
systemctl stop reeve
so "after a stop the worker is refused the rest" 000 bash -c 'from_worker http://192.0.2.2:8000/'
so "after a stop a job below the enforced parent is refused" 000 job --slice=jobs.slice $fetch http://192.0.2.2:8000/

if [ $failed -gt 0 ]; then
    journalctl -o cat -u reeve -u reeve-guard | tail -n 30
fi
systemctl stop nginx worker@1 reeve-guard
/usr/local/bin/reeve detach --config /etc/reeve/reeve.yaml > /dev/null
nsenter --net=/run/netns/out nginx -c /run/kernels/out.conf -s stop
ip netns del out
exit $((failed > 0))
