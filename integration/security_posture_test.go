//go:build integration

package integration

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/images/imagestest"
	"github.com/berth-run/berth/integration/lab"
)

const (
	noCapabilities = "0000000000000000"
	// The set that Docker and containerd give to a container that asks for nothing.
	defaultCapabilities = "00000000a80425fb"
)

// containerPosture is that of a container that asks for nothing, in a pod that has all namespaces for itself.
func containerPosture() posture {
	want := posture{
		"Uid": "0 0 0 0", "Gid": "0 0 0 0", "Groups": "0", "CapInh": noCapabilities, "CapAmb": noCapabilities,
		"CapPrm": defaultCapabilities, "CapEff": defaultCapabilities, "CapBnd": defaultCapabilities,
		"NoNewPrivs": "0", "Seccomp": "2", "SigBlk": noCapabilities, "SigIgn": noCapabilities, "Umask": "0022",
		"namespace cgroup": "own", "namespace ipc": "pod", "namespace mnt": "own", "namespace net": "pod", "namespace pid": "own",
		"namespace time": "host", "namespace user": "host", "namespace uts": "pod",
		"oom_score_adj": "1000", "cgroup": "/ID", "root": "own",
	}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err != nil {
		want["namespace cgroup"] = "host" // v1, as with containerd
	}
	return want
}

// The posture of init and exec of every kind of container: everything that keeps it in, compared as a whole.
func (s *security) TestPostureOfContainers(t *testing.T) {
	own := readStatus(t, os.Getpid())
	for name, test := range map[string]struct {
		kind   podKind
		change func(*runtimeapi.LinuxContainerSecurityContext)
		want   posture
	}{
		"default":      {kind: plainPod},
		"shared PID":   {kind: sharedPIDPod, want: posture{"namespace pid": "pod"}},
		"host IPC":     {kind: hostIPCPod, want: posture{"namespace ipc": "host"}},
		"host network": {kind: hostNetworkPod, want: posture{"namespace net": "host", "namespace uts": "host"}},
		"privileged": {privilegedPod, func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.Privileged = true }, posture{
			"CapPrm": own["CapBnd"], "CapEff": own["CapBnd"], "CapBnd": own["CapBnd"], "Seccomp": "0", "namespace cgroup": "host",
		}},
		"non-root": {plainPod, func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.RunAsUser, sc.RunAsGroup, sc.SupplementalGroups = &runtimeapi.Int64Value{Value: 1000}, &runtimeapi.Int64Value{Value: 3000}, []int64{4000}
		}, posture{"Uid": "1000 1000 1000 1000", "Gid": "3000 3000 3000 3000", "Groups": "3000 4000 50000", "CapPrm": noCapabilities, "CapEff": noCapabilities}},
		"restricted": {plainPod, func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.RunAsUser, sc.NoNewPrivs, sc.ReadonlyRootfs = &runtimeapi.Int64Value{Value: 65534}, true, true
			sc.Capabilities = &runtimeapi.Capability{DropCapabilities: []string{"ALL"}}
		}, posture{"Uid": "65534 65534 65534 65534", "Gid": "65534 65534 65534 65534", "Groups": "65534", "NoNewPrivs": "1", "CapPrm": noCapabilities, "CapEff": noCapabilities, "CapBnd": noCapabilities}},
		"unconfined": {plainPod, func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}
		}, posture{"Seccomp": "0"}},
		"added": {plainPod, func(sc *runtimeapi.LinuxContainerSecurityContext) {
			sc.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"NET_ADMIN"}, DropCapabilities: []string{"MKNOD", "CHOWN"}}
		}, posture{"CapPrm": "00000000a00435fa", "CapEff": "00000000a00435fa", "CapBnd": "00000000a00435fa"}},
	} {
		t.Run(name, func(t *testing.T) {
			p := s.pod(t, test.kind)
			ctr := s.container("", "")
			ctr.Command = []string{"sleep", "86400"} // no shell: it would change signals
			if test.kind == sharedPIDPod {
				ctr.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
			}
			if test.change != nil {
				test.change(ctr.Linux.SecurityContext)
			}
			id := s.start(t, p, ctr)
			want := containerPosture().with(test.want)
			init := s.info(t, id).PID
			running(t, init, "sleep 86400")
			s.posture(t, init, p, 0).want(t, "init", want)
			run := s.execPID(t, id)
			for kind, where := range want {
				if where == "own" && strings.HasPrefix(kind, "namespace ") {
					want[kind] = "init's"
				}
			}
			s.posture(t, run, p, init).want(t, "exec", want)
			streams := map[int]string{0: "own /dev/null", 1: "pipe", 2: "pipe"}
			for who, pid := range map[string]int{"init": init, "exec": run} {
				if got := s.descriptors(t, pid); !maps.Equal(got, streams) {
					t.Errorf("%s has the descriptors %v, want %v", who, got, streams)
				}
				if cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid)); err != nil || cwd != "/" {
					t.Errorf("%s is in %q (%v)", who, cwd, err)
				}
				var env []string
				text, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
				must(t, err)
				for kv := range strings.SplitSeq(strings.TrimRight(string(text), "\x00"), "\x00") {
					key, _, _ := strings.Cut(kv, "=")
					env = append(env, key)
				}
				if got := strings.Join(env, " "); got != "PATH HOSTNAME HOME" {
					t.Errorf("%s has the environment %q", who, text)
				}
			}
			if session := readStatus(t, init)["NSsid"]; test.kind != sharedPIDPod && !strings.HasSuffix(session, " 1") {
				t.Errorf("init is in session %s", session)
			}
		})
	}
}

// The posture of what runs for berth on the host: the daemon, the exec server, a shim of each kind and its helper.
func (s *security) TestPostureOfShimExecServerAndDaemon(t *testing.T) {
	daemon := s.Berth.PID()
	own := readStatus(t, os.Getpid())
	score, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", daemon))
	must(t, err)
	// Go blocks and unblocks signals of its threads as it likes.
	host := posture{
		"Uid": "0 0 0 0", "Gid": "0 0 0 0", "Groups": own["Groups"], "CapInh": own["CapInh"], "CapAmb": own["CapAmb"], "CapPrm": own["CapPrm"],
		"CapEff": own["CapEff"], "CapBnd": own["CapBnd"], "NoNewPrivs": "0", "Seccomp": own["Seccomp"], "SigBlk": "",
		"SigIgn": own["SigIgn"], "Umask": own["Umask"], "oom_score_adj": strings.TrimSpace(string(score)), "root": "host",
	}
	for _, kind := range namespaceKinds {
		host["namespace "+kind] = "host"
	}
	host["cgroup"] = cgroupPosture(t, os.Getpid(), "")
	golang := func(pid int, p *securityPod) posture {
		got := s.posture(t, pid, p, 0)
		got["SigBlk"] = ""
		return got
	}
	// Go reads the CPU limit of its cgroup, libcontainer keeps the root of cgroups open; all of it is close-on-exec.
	common := []string{
		"the host's /dev/null", "socket", "pipe", "anon_inode:[[]eventpoll]", "anon_inode:[[]eventfd]", "anon_inode:[[]pidfd]",
		"/sys/fs/cgroup", "/sys/fs/cgroup/cpu/*.cfs_*_us", "/sys/fs/cgroup/cpu/*/*.cfs_*_us", "/sys/fs/cgroup/cpu/*/*/*.cfs_*_us", "/sys/fs/cgroup/*cpu.max",
	}
	golang(daemon, nil).want(t, "daemon", host)
	// What the cases before have removed is deleted in the background, by directories that are open meanwhile.
	must(t, lab.Eventually(t.Context(), soon, "the trash is empty", func(context.Context) error {
		left, err := os.ReadDir(filepath.Join(s.Root(), "images", "trash"))
		if err == nil && len(left) > 0 {
			err = fmt.Errorf("%d entries", len(left))
		}
		return err
	}))
	s.onlyFiles(t, "daemon", daemon, append(common, "/", "berth.log", "anon_inode:inotify", "/memfd:berth-shim (deleted)",
		"root/lock", "run/lock", "root/berth.lock", "run/berth.lock", "mnt", "root/images", "root/images/*", "root/images/*/*")...)
	server := s.execServer(t)
	golang(server, nil).want(t, "exec server", host.with(posture{"SigIgn": noCapabilities}))
	s.onlyFiles(t, "exec server", server, append(common, "/", "berth.log")...)

	lowest := "-998"
	if bits, err := strconv.ParseUint(own["CapEff"], 16, 64); err == nil && bits&(1<<unix.CAP_SYS_RESOURCE) == 0 {
		lowest = host["oom_score_adj"]
	}
	inPod := host.with(posture{
		"namespace net": "pod", "namespace ipc": "pod", "namespace uts": "pod", "namespace mnt": "own", "oom_score_adj": lowest, "cgroup": "/ID",
		"SigIgn": "0000000000005007", // SIGHUP, SIGINT, SIGQUIT, SIGPIPE, SIGTERM: only the daemon ends a sandbox
	})
	for kind, change := range map[podKind]posture{
		plainPod: nil, privilegedPod: nil, sharedPIDPod: nil, hostNetworkPod: {"namespace net": "host", "namespace uts": "host"}, hostIPCPod: {"namespace ipc": "host"},
	} {
		p := s.ownPod(t, s.podConfig(kind))
		shim := s.shim(t, p)
		for who, pid := range map[string]int{"shim": shim, "exec server": server} {
			env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
			must(t, err)
			for kv := range strings.SplitSeq(strings.TrimRight(string(env), "\x00"), "\x00") {
				if kv == "" || who == "shim" && kv == "_BERTH_JOIN=" { // what was in it is used up
					continue
				}
				if key, _, _ := strings.Cut(kv, "="); key != "PATH" && key != "GOMAXPROCS" {
					t.Errorf("%s has %s in its environment: whatever the daemon's has stays with it", who, key)
				}
			}
		}
		golang(shim, p).want(t, "shim of a pod "+string(kind), inPod.with(change))
		s.onlyFiles(t, "shim of a pod "+string(kind), shim, append(common, "run/pods/ID/shim.log")...)
		if helper := childOf(t, shim, "berth-shim create"); helper > 0 { // it ends when it has nothing to do
			const parked = "0000000000000003" // until it creates a container
			// Just started, it has the shim's until its Go runtime has set its own.
			for end := time.Now().Add(5 * time.Second); readStatus(t, helper)["SigIgn"] != parked && time.Now().Before(end); {
				time.Sleep(5 * time.Millisecond)
			}
			golang(helper, p).want(t, "helper of a shim", inPod.with(change).with(posture{"SigIgn": parked}))
			s.onlyFiles(t, "helper of a shim", helper, append(common, "run/pods/ID/shim.log")...)
		} else {
			t.Errorf("the shim of a pod %s has no helper ready", kind)
		}
		id := s.start(t, p, s.idle(""))
		s.onlyFiles(t, "shim with a container", shim, append(common, "run/pods/ID/shim.log", "logs/*/*.log")...)
		s.remove(t, id)
	}
}

// running waits until a process is that program: a container that was started has yet to run it.
func running(t *testing.T, pid int, cmdline string) {
	t.Helper()
	must(t, lab.Eventually(t.Context(), 10*time.Second, cmdline+" runs", func(context.Context) error {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if got := strings.TrimSpace(strings.ReplaceAll(string(text), "\x00", " ")); err == nil && got != cmdline {
			err = fmt.Errorf("process %d is %q", pid, got)
		}
		return err
	}))
}

// childOf is a child with that command line, or 0.
func childOf(t *testing.T, parent int, cmdline string) int {
	t.Helper()
	for _, p := range processes(t) {
		if p.parent == parent && p.cmdline == cmdline {
			return p.pid
		}
	}
	return 0
}

// The PID 1 of a shared PID namespace is a process that containers of the pod see. One that may trace others (SYS_PTRACE, as
// debuggers have it) takes it over: there must be nothing that it has and they have not, the host's files least of all.
func (s *security) TestPostureOfSharedPIDOne(t *testing.T) {
	p := s.pod(t, sharedPIDPod)
	pause := childOf(t, s.shim(t, p), "berth-shim pause")
	if pause == 0 {
		t.Fatal("no process 1")
	}
	got := s.posture(t, pause, p, 0)
	for _, field := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
		if got[field] != noCapabilities {
			t.Errorf("%s is %s", field, got[field])
		}
	}
	for field, want := range map[string]string{
		"namespace mnt": "own", "namespace net": "pod", "namespace pid": "pod", "namespace ipc": "pod", "namespace uts": "pod",
		"root": "own", "NoNewPrivs": "1", "Uid": "65534 65534 65534 65534", "Gid": "65534 65534 65534 65534", "Groups": "", "cgroup": "/ID",
	} {
		if got[field] != want {
			t.Errorf("%s is %q, want %q", field, got[field], want)
		}
	}
	if entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/root", pause)); err != nil || len(entries) > 0 {
		t.Errorf("its root has %v (%v)", entries, err)
	}
	if open := s.descriptors(t, pause); len(open) > 0 {
		t.Errorf("its descriptors: %v", open)
	}
	if text, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pause)); err != nil || strings.Count(string(text), "\n") != 1 {
		t.Errorf("its mounts: %s (%v)", text, err)
	}
	ctr := s.idle("")
	ctr.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
	ctr.Linux.SecurityContext.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"SYS_PTRACE"}}
	ctr.Linux.SecurityContext.Seccomp = nil
	id := s.start(t, p, ctr)
	out, _ := s.exec(t, id, "ls -A /proc/1/root/; cat /proc/1/root"+s.sentinel.Dir+"/etc/shadow; ls -l /proc/1/fd; cat /proc/1/environ")
	if strings.Contains(out, "sentinel etc/shadow") || strings.Contains(out, "bin\n") || strings.Contains(out, "shim.log") {
		t.Errorf("a container that may trace sees the host: %s", out)
	}
}

// Standard streams of a container that are files of the host can be opened again through /proc, and their mode, owner and
// attributes be changed: a container that makes the host's /dev/null unusable takes the host down.
func (s *security) TestStandardStreamsAreNoFilesOfTheHost(t *testing.T) {
	var before unix.Stat_t
	must(t, unix.Stat("/dev/null", &before))
	if before.Mode&0o777 != 0o666 {
		t.Fatalf("/dev/null has mode %o before the attack", before.Mode)
	}
	t.Cleanup(func() {
		var after unix.Stat_t
		must(t, unix.Stat("/dev/null", &after))
		if after.Mode != before.Mode || after.Uid != before.Uid {
			t.Errorf("the host's /dev/null has mode %o, owner %d now", after.Mode, after.Uid)
			must(t, os.Chmod("/dev/null", 0o666))
			must(t, os.Chown("/dev/null", int(before.Uid), int(before.Gid)))
		}
	})
	const attack = "for f in /proc/[0-9]*/fd/[0-9]*; do chmod 0667 $f; done 2>/dev/null; true"
	p := s.pod(t, plainPod)
	plain, volume := s.idle(""), s.idle("")
	volume.Mounts = []*runtimeapi.Mount{bindMount(s.ownDev(t), "/dev")} // where libcontainer replaces no stream
	for name, ctr := range map[string]*runtimeapi.ContainerConfig{"plain": plain, "with a volume at /dev": volume} {
		id := s.start(t, p, ctr)
		pids := []int{s.info(t, id).PID, s.execPID(t, id)}
		if out, code := s.exec(t, id, attack); code != 0 {
			t.Errorf("%s: %s", name, out)
		}
		for _, pid := range pids {
			for n, is := range s.descriptors(t, pid) {
				if is != "own /dev/null" && is != "pipe" {
					t.Errorf("%s: descriptor %d of process %d is %s", name, n, pid, is)
				}
			}
		}
	}
	ctr := s.idle("")
	ctr.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
	if out, code := s.exec(t, s.start(t, s.pod(t, sharedPIDPod), ctr), attack); code != 0 {
		t.Error(out)
	}
}

// ownDev is a volume with the nodes that masking needs.
func (s *security) ownDev(t *testing.T) string {
	t.Helper()
	dir := s.volume(t)
	for name, minor := range map[string]uint32{"null": 3, "zero": 5} {
		must(t, unix.Mknod(filepath.Join(dir, name), unix.S_IFCHR|0o666, int(unix.Mkdev(1, minor))))
	}
	for _, name := range []string{"pts", "shm", "mqueue"} {
		must(t, os.Mkdir(filepath.Join(dir, name), 0o755))
	}
	return dir
}

// Inheritable capabilities come back through programs that have some in their file.
func (s *security) TestCVE_2022_29162_InheritableIsEmpty(t *testing.T) {
	p := s.pod(t, plainPod)
	// A program with all of the default capabilities inheritable and effective, as `setcap all=ei` makes it.
	attr := "\x01\x00\x00\x02\x00\x00\x00\x00\xfb\x25\x04\xa8\x00\x00\x00\x00\x00\x00\x00\x00"
	program, err := os.ReadFile(s.Tools.Busybox)
	must(t, err)
	image := s.image(t, nil, imagestest.File("gain/busybox", string(program)).Mode(0o755).Xattr("security.capability", attr))
	for _, uid := range []int64{0, 1000} {
		ctr := s.idle(image)
		ctr.Linux.SecurityContext.RunAsUser = &runtimeapi.Int64Value{Value: uid}
		ctr.Linux.SecurityContext.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"NET_ADMIN"}}
		id := s.start(t, p, ctr)
		for _, pid := range []int{s.info(t, id).PID, s.execPID(t, id)} {
			if st := readStatus(t, pid); st["CapInh"] != noCapabilities || st["CapAmb"] != noCapabilities {
				t.Errorf("uid %d: process %d has CapInh %s, CapAmb %s", uid, pid, st["CapInh"], st["CapAmb"])
			}
		}
		out, code := s.exec(t, id, "/gain/busybox grep CapEff /proc/self/status")
		if uid != 0 && (code != 0 || out != "CapEff:\t"+noCapabilities+"\n") {
			t.Errorf("uid %d gains %q, exit code %d", uid, out, code)
		}
	}
	ctr := s.idle("")
	ctr.Linux.SecurityContext.RunAsUser = &runtimeapi.Int64Value{Value: 1000}
	ctr.Linux.SecurityContext.Capabilities = &runtimeapi.Capability{AddAmbientCapabilities: []string{"NET_BIND_SERVICE"}}
	id := s.start(t, p, ctr)
	for _, pid := range []int{s.info(t, id).PID, s.execPID(t, id)} {
		if st := readStatus(t, pid); st["CapAmb"] != "0000000000000400" || st["CapEff"] != "0000000000000400" {
			t.Errorf("ambient as asked: process %d has %s, effective %s", pid, st["CapAmb"], st["CapEff"])
		}
	}
}

// The host's program is written through /proc/self/exe of a process that the runtime starts in the container.
func (s *security) TestCVE_2019_5736_HostProgramIsUnchanged(t *testing.T) {
	daemon := s.Berth.PID()
	programs := map[string]string{}
	for name, path := range map[string]string{
		"berth": fmt.Sprintf("/proc/%d/exe", daemon), "exec server": fmt.Sprintf("/proc/%d/exe", s.execServer(t)), "shim": fmt.Sprintf("/proc/%d/exe", s.shim(t, s.pod(t, plainPod))),
	} {
		programs[path] = hashFile(t, path)
		if name == "berth" {
			continue
		}
		target, err := os.Readlink(path)
		if err != nil || !strings.HasPrefix(target, "/memfd:") {
			t.Errorf("%s runs %s (%v)", name, target, err)
			continue
		}
		f, err := os.Open(path)
		must(t, err)
		seals, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
		must(t, err)
		if all := unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE; seals&all != all {
			t.Errorf("%s has the seals %#x, want %#x", name, seals, all)
		}
		if w, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0); err == nil {
			_, werr := w.Write([]byte("x"))
			t.Errorf("%s can be opened for writing; write: %v", name, werr)
			_ = w.Close()
		}
		_ = f.Close()
	}
	for name, cmd := range map[string][]string{
		"entrypoint": {"/proc/self/exe"}, "init": {"/proc/self/exe", "init"}, "link": {"/link"}, "script": {"/script"},
	} {
		image := s.image(t, nil, imagestest.Symlink("link", "/proc/self/exe"), imagestest.File("script", "#!/proc/self/exe\n").Mode(0o755))
		ctr := s.container(image, "")
		ctr.Command = cmd
		out, _, err := s.output(t, s.pod(t, plainPod), ctr)
		t.Logf("%s: %v %.100s", name, err, out)
	}
	// An attacker with more than the default: it may look at processes that are not dumpable.
	attacker := s.container("", `n=0; while :; do for p in /proc/[0-9]*; do l=$(readlink $p/exe); case "$l" in *memfd*|*berth*) echo "saw $l"; true 2>/dev/null >>$p/exe && echo WROTE; esac; done; done`)
	attacker.Linux.SecurityContext.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"SYS_PTRACE"}}
	p := s.pod(t, plainPod)
	id := s.start(t, p, attacker)
	const most, enough = 1000, 60
	execs := 0
	for end := time.Now().Add(20 * time.Second); execs < enough || execs < most && time.Now().Before(end); execs++ {
		if _, code := s.exec(t, id, "true"); code != 0 {
			t.Fatalf("exec: exit code %d", code)
		}
	}
	text, err := os.ReadFile(filepath.Join(p.cfg.LogDirectory, attacker.LogPath))
	must(t, err)
	seen := strings.Count(string(text), "saw ")
	t.Logf("the attacker saw the program %d times in %d execs", seen, execs)
	if seen == 0 {
		t.Error("the attack did not take place")
	}
	if strings.Contains(string(text), "WROTE") {
		t.Errorf("the attacker opened it for writing: %.1000s", text)
	}
	for path, before := range programs {
		if after := hashFile(t, path); after != before {
			t.Errorf("%s has changed", path)
		}
	}
}

// With vm.memfd_noexec=2 there is no executable memory file, and the reason is said in one line.
func (s *security) TestCVE_2019_5736_MemfdNoexec(t *testing.T) {
	program, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", s.Berth.PID()))
	must(t, err)
	dir := s.volume(t)
	// The sysctl belongs to a PID namespace: the machine's stays as it is.
	out, err := runFor(t, 20*time.Second, "unshare", "--pid", "--fork", "--mount-proc", "sh", "-c",
		"echo 2 > /proc/sys/vm/memfd_noexec || exit 77; exec "+program+" serve --root "+dir+"/root --run "+dir+"/run --socket "+dir+"/run/s.sock --cni-conf "+dir+" --cni-bin "+s.Tools.CNI)
	if code := exitCode(err); code == 77 {
		t.Skip("this kernel has no vm.memfd_noexec")
	}
	if err == nil || !strings.Contains(out, "vm.memfd_noexec") || !strings.Contains(out, "berth: ") {
		t.Errorf("%v: %s", err, out)
	}
}
