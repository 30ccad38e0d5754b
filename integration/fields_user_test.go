//go:build integration

package integration

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/images/imagestest"
	"github.com/berth-run/berth/integration/testimages"
)

type containerSecurity = runtimeapi.LinuxContainerSecurityContext

func number(n int64) *runtimeapi.Int64Value { return &runtimeapi.Int64Value{Value: n} }

// userFields are about who a container's processes are. The image's users are those of testimages: default-user is 1000,
// and in the group 50000; www-data is 33.
func userFields() []fieldGroup {
	is := func(name, about string, change func(*containerSecurity), uid, gid int64, groups ...int64) fieldCase {
		return fieldCase{name, about, func(t *testing.T, f *fields) {
			f.wantUser(t, f.idleWith(withSecurity(change)), uid, gid, groups)
		}}
	}
	refused := func(name, about, word string, change func(*containerSecurity)) fieldCase {
		return fieldCase{name, about, func(t *testing.T, f *fields) {
			f.refused(t, f.pod(t, plainPod), f.ctr("id", withSecurity(change)), codes.InvalidArgument, word)
		}}
	}
	const (
		user   = "LinuxContainerSecurityContext.run_as_user Int64Value.value"
		group  = "LinuxContainerSecurityContext.run_as_group"
		name   = "LinuxContainerSecurityContext.run_as_username"
		groups = "LinuxContainerSecurityContext.supplemental_groups"
		policy = "LinuxContainerSecurityContext.supplemental_groups_policy"
		merge  = runtimeapi.SupplementalGroupsPolicy_Merge
		strict = runtimeapi.SupplementalGroupsPolicy_Strict
	)
	ofImage := func(name, imageUser string, uid, gid int64, groups ...int64) fieldCase {
		return fieldCase{name, "ContainerConfig.image", func(t *testing.T, f *fields) {
			image := f.image(t, func(i *imagestest.Image) { i.Config.Config.User = imageUser })
			cfg := f.idle(image)
			f.wantUser(t, cfg, uid, gid, groups)
		}}
	}
	return []fieldGroup{{"user", []fieldCase{
		is("nobody said: root", user, func(*containerSecurity) {}, 0, 0, 0),
		is("run_as_user of the image", user, func(s *containerSecurity) { s.RunAsUser = number(1000) }, 1000, 1000, 1000, 50000),
		is("run_as_user that the image does not know", user, func(s *containerSecurity) { s.RunAsUser = number(4711) }, 4711, 0, 0),
		is("run_as_user 0", user, func(s *containerSecurity) { s.RunAsUser = number(0) }, 0, 0, 0),
		is("the highest run_as_user", user, func(s *containerSecurity) { s.RunAsUser = number(1<<31 - 1) }, 1<<31-1, 0, 0),
		is("run_as_group", group, func(s *containerSecurity) { s.RunAsUser, s.RunAsGroup = number(1000), number(99) }, 1000, 99, 99, 50000),
		is("run_as_group 0", group, func(s *containerSecurity) { s.RunAsUser, s.RunAsGroup = number(1000), number(0) }, 1000, 0, 0, 50000),
		is("run_as_username", name, func(s *containerSecurity) { s.RunAsUsername = "default-user" }, 1000, 1000, 1000, 50000),
		is("run_as_username and run_as_group", name+" "+group, func(s *containerSecurity) { s.RunAsUsername, s.RunAsGroup = "www-data", number(7) }, 33, 7, 7),
		is("supplemental_groups", groups, func(s *containerSecurity) { s.SupplementalGroups = []int64{7, 5, 7} }, 0, 0, 0, 5, 7),
		is("Merge adds the image's groups", policy+" "+groups, func(s *containerSecurity) {
			s.RunAsUser, s.SupplementalGroups, s.SupplementalGroupsPolicy = number(1000), []int64{60000}, merge
		}, 1000, 1000, 1000, 50000, 60000),
		is("Strict does not", policy+" "+groups, func(s *containerSecurity) {
			s.RunAsUser, s.SupplementalGroups, s.SupplementalGroupsPolicy = number(1000), []int64{60000}, strict
		}, 1000, 1000, 1000, 60000),
		is("Strict with nothing given", policy, func(s *containerSecurity) { s.RunAsUser, s.SupplementalGroupsPolicy = number(1000), strict }, 1000, 1000, 1000),
		is("Strict with a group", policy+" "+group, func(s *containerSecurity) {
			s.RunAsUser, s.RunAsGroup, s.SupplementalGroupsPolicy = number(1000), number(77), strict
		}, 1000, 77, 77),
		refused("a group without a user", group, "run_as_group", func(s *containerSecurity) { s.RunAsGroup = number(99) }),
		refused("a name that the image does not have", name, "run_as_username", func(s *containerSecurity) { s.RunAsUsername = "no-such-user" }),
		refused("a negative user", user, "run_as_user", func(s *containerSecurity) { s.RunAsUser = number(-1) }),
		{"a policy that does not exist", policy, func(t *testing.T, f *fields) {
			if f.peer {
				t.Skip("containerd takes it for Merge where it does not know it")
			}
			f.refused(t, f.pod(t, plainPod), f.ctr("id", withSecurity(func(s *containerSecurity) { s.SupplementalGroupsPolicy = 9 })), codes.InvalidArgument, "supplemental_groups_policy")
		}},
		ofImage("USER of the image, a number", "1000", 1000, 1000, 1000, 5000),
		ofImage("USER of the image, a name", "user", 1000, 1000, 1000, 5000),
		ofImage("USER of the image with a group", "user:5000", 1000, 5000, 5000),
		{"HOME is the user's", user, func(t *testing.T, f *fields) {
			f.says(t, f.pod(t, plainPod), f.ctr("echo $HOME", withSecurity(func(s *containerSecurity) { s.RunAsUser = number(33) })), "/var/www\n")
			f.says(t, f.pod(t, plainPod), f.ctr("echo $HOME", withSecurity(func(s *containerSecurity) { s.RunAsUser = number(4711) })), "/\n")
		}},
	}}}
}

// wantUser starts a container and wants its first process, an exec, and its status to be of that user.
func (f *fields) wantUser(t *testing.T, cfg *runtimeapi.ContainerConfig, uid, gid int64, groups []int64) {
	t.Helper()
	p := f.pod(t, plainPod)
	cfg.Command = []string{"sh", "-c", "id -u; id -g; grep Groups: /proc/self/status; trap 'exit 0' TERM; sleep 86400 & wait"}
	id := f.start(t, p, cfg)
	slices.Sort(groups)
	words := strings.Trim(fmt.Sprint(groups), "[]")
	want := fmt.Sprintf("%d\n%d\nGroups:\t%s \n", uid, gid, words)
	f.waitLog(t, p, cfg, "Groups:")
	if got := sortGroups(f.log(t, p, cfg)); got != want {
		t.Errorf("init is %q, want %q", got, want)
	}
	out, code := f.exec(t, id, "id -u; id -g; grep Groups: /proc/self/status")
	if got := sortGroups(out); code != 0 || got != want {
		t.Errorf("an exec is %q, want %q", got, want)
	}
	u := f.status(t, id).GetUser().GetLinux()
	got := slices.Clone(u.GetSupplementalGroups())
	slices.Sort(got)
	if u.GetUid() != uid || u.GetGid() != gid || !slices.Equal(got, groups) {
		t.Errorf("status %v, want uid %d, gid %d, groups %v", u, uid, gid, groups)
	}
}

// sortGroups sorts the numbers of a line "Groups:".
func sortGroups(text string) string {
	head, list, ok := strings.Cut(text, "Groups:\t")
	if !ok {
		return text
	}
	var ids []int
	for word := range strings.FieldsSeq(list) {
		var id int
		if _, err := fmt.Sscan(word, &id); err != nil {
			return text
		}
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return head + "Groups:\t" + strings.Trim(fmt.Sprint(slices.Compact(ids)), "[]") + " \n"
}

// capabilityFields are about capabilities, and what a program can gain.
func capabilityFields() []fieldGroup {
	has := func(name, about string, change func(*containerSecurity), script, want string) fieldCase {
		return fieldCase{name, about, func(t *testing.T, f *fields) {
			f.says(t, f.pod(t, plainPod), f.ctr(script, withSecurity(change)), want)
		}}
	}
	const (
		add    = "LinuxContainerSecurityContext.capabilities Capability.add_capabilities"
		drop   = "Capability.drop_capabilities"
		raised = "Capability.add_ambient_capabilities"
		eff    = "grep CapEff: /proc/self/status"
		bound  = "grep CapBnd: /proc/self/status"
	)
	caps := func(add, drop, ambient string) func(*containerSecurity) {
		return func(s *containerSecurity) {
			s.Capabilities = &runtimeapi.Capability{AddCapabilities: strings.Fields(add), DropCapabilities: strings.Fields(drop), AddAmbientCapabilities: strings.Fields(ambient)}
		}
	}
	return []fieldGroup{{"capabilities", []fieldCase{
		has("by default", add, func(*containerSecurity) {}, eff, "CapEff:\t00000000a80425fb\n"),
		has("one more", add, caps("NET_ADMIN", "", ""), eff, "CapEff:\t00000000a80435fb\n"),
		{"with a prefix", add, func(t *testing.T, f *fields) {
			if f.peer {
				t.Skip("containerd takes names without it only")
			}
			f.says(t, f.pod(t, plainPod), f.ctr(eff, withSecurity(caps("CAP_SYS_TIME", "", ""))), "CapEff:\t00000000aa0425fb\n")
		}},
		has("one less", drop, caps("", "CHOWN", ""), eff+"; chown 1 /etc/passwd 2>/dev/null || echo cannot", "CapEff:\t00000000a80425fa\ncannot\n"),
		has("none", drop, caps("", "ALL", ""), eff+"; "+bound, "CapEff:\t0000000000000000\nCapBnd:\t0000000000000000\n"),
		has("none but one", add+" "+drop, caps("NET_BIND_SERVICE", "ALL", ""), eff+"; "+bound, "CapEff:\t0000000000000400\nCapBnd:\t0000000000000400\n"),
		has("added and dropped", add+" "+drop, caps("NET_ADMIN", "NET_ADMIN", ""), eff, "CapEff:\t00000000a80425fb\n"),
		{"all", add, func(t *testing.T, f *fields) {
			f.says(t, f.pod(t, plainPod), f.ctr(eff, withSecurity(caps("ALL", "", ""))), "CapEff:\t"+readStatus(t, 1)["CapBnd"]+"\n")
		}},
		{"all but one", add + " " + drop, func(t *testing.T, f *fields) {
			var all uint64
			_, err := fmt.Sscanf(readStatus(t, 1)["CapBnd"], "%x", &all)
			must(t, err)
			f.says(t, f.pod(t, plainPod), f.ctr(eff, withSecurity(caps("ALL", "CHOWN", ""))), fmt.Sprintf("CapEff:\t%016x\n", all&^1))
		}},
		has("a user other than root has none", add, func(s *containerSecurity) { s.RunAsUser = number(1000) }, eff+"; "+bound, "CapEff:\t0000000000000000\nCapBnd:\t00000000a80425fb\n"),
		{"ambient", raised, func(t *testing.T, f *fields) {
			if f.peer {
				t.Skip("containerd does not know it")
			}
			change := func(s *containerSecurity) {
				caps("", "ALL", "NET_BIND_SERVICE")(s)
				s.RunAsUser = number(1000)
			}
			f.says(t, f.pod(t, plainPod), f.ctr("grep -e CapEff: -e CapAmb: /proc/self/status", withSecurity(change)), "CapEff:\t0000000000000400\nCapAmb:\t0000000000000400\n")
		}},
		has("an exec has the same", add, caps("NET_ADMIN", "CHOWN", ""), eff, "CapEff:\t00000000a80435fa\n"),
		{"a capability that does not exist", add, func(t *testing.T, f *fields) {
			if f.peer {
				t.Skip("runc leaves it out with a warning")
			}
			f.refused(t, f.pod(t, plainPod), f.ctr("true", withSecurity(caps("NO_SUCH_THING", "", ""))), codes.InvalidArgument, "NO_SUCH_THING")
		}},
		{"setuid works", "LinuxContainerSecurityContext.no_new_privs", func(t *testing.T, f *fields) {
			f.says(t, f.pod(t, plainPod), f.setuid(false), "Effective uid: 0\n")
		}},
		{"setuid does not with no_new_privs", "LinuxContainerSecurityContext.no_new_privs", func(t *testing.T, f *fields) {
			f.says(t, f.pod(t, plainPod), f.setuid(true), "Effective uid: 1000\n")
		}},
		{"no_new_privs of an exec", "LinuxContainerSecurityContext.no_new_privs", func(t *testing.T, f *fields) {
			id := f.start(t, f.pod(t, plainPod), f.idleWith(withSecurity(func(s *containerSecurity) { s.NoNewPrivs = true })))
			if out, code := f.exec(t, id, "grep NoNewPrivs: /proc/self/status"); code != 0 || out != "NoNewPrivs:\t1\n" {
				t.Errorf("exit code %d: %q", code, out)
			}
		}},
	}}}
}

// setuid runs a setuid program of root's as somebody else.
func (f *fields) setuid(noNewPrivs bool) *runtimeapi.ContainerConfig {
	cfg := f.ctr("", withSecurity(func(s *containerSecurity) { s.RunAsUser, s.NoNewPrivs = number(1000), noNewPrivs }))
	cfg.Image.Image, cfg.Command = strings.Replace(testimages.Busybox, "busybox:latest", "nonewprivs:1.3", 1), nil
	return cfg
}
