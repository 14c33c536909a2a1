#!/bin/bash
# Runs the steps of the plan in a guest. Lines that begin with "kernels: " are for `cargo xtask kernels`.
. /mnt/plan
export NO_COLOR=1 SYSTEMD_COLORS=0 SYSTEMD_PAGER=cat HOME=/root
export REEVE=/mnt/reeve REEVE_PEER=/mnt/peer
mkdir -p /run/kernels
cd /run/kernels
# Some tests have thousands of connections; systemd gives a unit 1024 files at first.
ulimit -n 65536

load() { bash /mnt/load.sh; }
units() { bash /mnt/units.sh; }
# With the time that each test took, which tests of a stable compiler tell only so. What the programs cost is
# measured on a real processor: under emulation the bounds of these tests mean nothing.
datapath() {
    RUSTC_BOOTSTRAP=1 /mnt/datapath --test-threads 2 --nocapture -Z unstable-options --report-time \
        --skip cost:: $TESTS 2>&1
}
demo() { /mnt/xtask demo --daemon "$REEVE" --peer "$REEVE_PEER" 2>&1; }
e2e() { /mnt/e2e --test-threads 1 $END_TO_END 2>&1; }

echo "$(uname -r), $(systemctl --version | head -n 1), $(stat -f -c %T /sys/fs/cgroup), $(nproc) processors"
for step in $STEPS; do
    echo "── $step"
    begun=$SECONDS
    if "$step"; then result=held; else result=failed; fi
    echo "kernels: $result $step $((SECONDS - begun))"
done
[ -z "$KEEP" ] || systemctl start serial-getty@ttyS0
echo "kernels: done"
[ -n "$KEEP" ] || poweroff -f
