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
# inside CGROUP URL: what a process in the cgroup gets.
inside() {
    bash -c 'echo $$ > "/sys/fs/cgroup/$0/cgroup.procs"; exec curl -s -o /dev/null -m 5 -w "%{http_code}\n" "$1"' "$@"
}
from_worker() { inside "$(systemctl show -P ControlGroup worker@1)" "$1"; }
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

echo "what the guard cannot hold"
# guard_with WORKLOADS PARENTS [SETTING]: exit status of the guard with these, and a drop-in of its unit.
guard_with() {
    printf 'trustDomain: example.org\nworkloads: %s\nenforcedParents: %s\npolicies: {folder: policies}\n' \
        "$1" "$2" > /etc/reeve/reeve.yaml
    mkdir -p /run/systemd/system/reeve-guard.service.d
    printf '[Service]\n%s\n' "${3-}" > /run/systemd/system/reeve-guard.service.d/tried.conf
    systemctl daemon-reload
    systemctl stop reeve-guard
    # Also forgets how often it was started.
    systemctl reset-failed reeve-guard 2> /dev/null
    systemctl start reeve-guard 2> /dev/null
    echo "$(systemctl show -P Result reeve-guard) $(systemctl show -P ExecMainStatus reeve-guard)"
}
told() {
    journalctl --sync
    journalctl -o cat -u reeve-guard | grep 'NOT GUARDED'
}
cp /etc/reeve/reeve.yaml /run/kernels/both.yaml
printf '[Service]\nExecStart=/bin/sleep infinity\n' > /etc/systemd/system/late.service
late='[{name: late, unit: late.service}]'
so "a workload without a cgroup, below no enforced parent, fails the unit" "exit-code 3" guard_with "$late" '[/jobs.slice]'
so "and is named" "*workload late has no cgroup yet, and no enforced parent above*" told
so "the rest is guarded" 000 job --slice=jobs.slice $fetch http://192.0.2.2:8000/
so "it is no failure where the unit says so" "success 3" guard_with "$late" '[/jobs.slice]' SuccessExitStatus=3
so "nor where the workload's slice is an enforced parent" "success 0" guard_with "$late" '[/system.slice]'
so "a parent that is no slice is made at the root of the cgroups" "success 0" guard_with '[]' '[/kubepods]'
mkdir -p /sys/fs/cgroup/kubepods/pod
so "what is below it is refused" 000 inside /kubepods/pod http://192.0.2.2:8000/
rmdir /sys/fs/cgroup/kubepods/pod /sys/fs/cgroup/kubepods
so "without CAP_DAC_OVERRIDE the unit fails" "exit-code 1" guard_with '[]' '[/kubepods]' 'CapabilityBoundingSet=~CAP_DAC_OVERRIDE'
so "and says what it lacks" "*parent /kubepods is not there and cannot be made*without CAP_DAC_OVERRIDE*" told
so "under ProtectControlGroups= it fails as well" "exit-code 1" guard_with '[]' '[/kubepods]' ProtectControlGroups=yes
so "and says so" '*parent /kubepods is not there and cannot be made*`ProtectControlGroups=`*' told
so "a service is no parent that stays" "exit-code 1" guard_with '[]' '[/system.slice/late.service]'
so "and it says why" "*parent /system.slice/late.service goes whenever late.service stops*" told
rmdir /sys/fs/cgroup/system.slice/late.service 2> /dev/null
rm -r /run/systemd/system/reeve-guard.service.d /etc/systemd/system/late.service
cp /run/kernels/both.yaml /etc/reeve/reeve.yaml
systemctl daemon-reload
systemctl reset-failed reeve-guard
so "with nothing that is open the guard succeeds again" success bash -c 'systemctl start reeve-guard; systemctl show -P Result reeve-guard'

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
export -f inside from_worker
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
