package spec

import (
	"bytes"
	"fmt"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestUser(t *testing.T) {
	for _, c := range []struct {
		name     string
		image    string
		sc       *cri.LinuxContainerSecurityContext
		uid, gid uint32
		groups   []uint32
		home     string
	}{
		{"root by default", "", &cri.LinuxContainerSecurityContext{}, 0, 0, []uint32{0}, "/root"},
		{"image name", "web", &cri.LinuxContainerSecurityContext{}, 1000, 2000, []uint32{4, 29, 2000}, "/home/web"},
		{"image number with entry", "1000", &cri.LinuxContainerSecurityContext{}, 1000, 2000, []uint32{4, 29, 2000}, "/home/web"},
		{"image number without entry", "4711", &cri.LinuxContainerSecurityContext{}, 4711, 0, []uint32{0}, "/"},
		{"image name and group name", "web:logs", &cri.LinuxContainerSecurityContext{}, 1000, 4, []uint32{4, 29, 2000}, "/home/web"},
		{"image numbers", "4711:4712", &cri.LinuxContainerSecurityContext{}, 4711, 4712, []uint32{4712}, "/"},
		{"image name and number", "web:77", &cri.LinuxContainerSecurityContext{}, 1000, 77, []uint32{4, 29, 77, 2000}, "/home/web"},
		{"image number and group name", "4711:audio", &cri.LinuxContainerSecurityContext{}, 4711, 29, []uint32{29}, "/"},
		{"image group only", ":audio", &cri.LinuxContainerSecurityContext{}, 0, 29, []uint32{29}, "/root"},
		{"image with empty group", "web:", &cri.LinuxContainerSecurityContext{}, 1000, 2000, []uint32{4, 29, 2000}, "/home/web"},
		{"the highest id", "2147483647", &cri.LinuxContainerSecurityContext{}, 2147483647, 0, []uint32{0}, "/"},
		{"run_as_user beats the image", "web", &cri.LinuxContainerSecurityContext{RunAsUser: id(4711)}, 4711, 0, []uint32{0}, "/"},
		{"run_as_user 0 is asked for", "web", &cri.LinuxContainerSecurityContext{RunAsUser: id(0)}, 0, 0, []uint32{0}, "/root"},
		{"run_as_username", "daemon", &cri.LinuxContainerSecurityContext{RunAsUsername: "web"}, 1000, 2000, []uint32{4, 29, 2000}, "/home/web"},
		{"run_as_group", "", &cri.LinuxContainerSecurityContext{RunAsUser: id(1000), RunAsGroup: id(9)}, 1000, 9, []uint32{4, 9, 29, 2000}, "/home/web"},
		{
			"strict leaves out the image's groups", "",
			&cri.LinuxContainerSecurityContext{
				RunAsUser: id(1000), SupplementalGroups: []int64{600, 500},
				SupplementalGroupsPolicy: cri.SupplementalGroupsPolicy_Strict,
			},
			1000, 2000,
			[]uint32{500, 600, 2000},
			"/home/web",
		},
		{
			"merge keeps them, each once", "",
			&cri.LinuxContainerSecurityContext{RunAsUser: id(1000), SupplementalGroups: []int64{600, 29, 600}},
			1000, 2000,
			[]uint32{4, 29, 600, 2000},
			"/home/web",
		},
		{"entry without home", "nohome", &cri.LinuxContainerSecurityContext{}, 1001, 2001, []uint32{2001}, "/"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := validateIdentity(c.sc); err != nil {
				t.Fatal(err)
			}
			got, err := resolveIdentity(c.sc, c.image, []byte(testPasswd), []byte(testGroup))
			if err != nil {
				t.Fatal(err)
			}
			want := identity{c.uid, c.gid, c.groups, c.home}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got %+v, want %+v", got, want)
			}
		})
	}
}

func TestUserWithoutFiles(t *testing.T) {
	out := mustContainer(t, func(in *Input) { in.Passwd, in.Group, in.Image.User = nil, nil, "1234" })
	if u := out.Spec.Process.User; u.UID != 1234 || u.GID != 0 || !slices.Equal(u.AdditionalGids, []uint32{0}) {
		t.Errorf("user %+v", u)
	}
	refuse(t, func(in *Input) { in.Passwd, in.Image.User = nil, "web" }, `image USER: "web" is not in the image's /etc/passwd`)
}

func TestUserRefused(t *testing.T) {
	for _, c := range []struct {
		name, image string
		sc          *cri.LinuxContainerSecurityContext
		words       []string
	}{
		{"unknown name", "nobody", &cri.LinuxContainerSecurityContext{}, []string{`image USER: "nobody" is not in the image's /etc/passwd`}},
		{"unknown group", "web:none", &cri.LinuxContainerSecurityContext{}, []string{`group "none"`}},
		{"two colons", "web:logs:x", &cri.LinuxContainerSecurityContext{}, []string{"more than one colon"}},
		{"newline", "web\nroot", &cri.LinuxContainerSecurityContext{}, []string{"control character"}},
		{"unknown requested name", "", &cri.LinuxContainerSecurityContext{RunAsUsername: "nobody"}, []string{"config.linux.security_context.run_as_username", "nobody"}},
		{"name with a group", "", &cri.LinuxContainerSecurityContext{RunAsUsername: "web:root"}, []string{"colon"}},
		{"name with a newline", "", &cri.LinuxContainerSecurityContext{RunAsUsername: "web\n"}, []string{"control character"}},
		{"name and number", "", &cri.LinuxContainerSecurityContext{RunAsUsername: "web", RunAsUser: id(0)}, []string{"together"}},
		{"group without user", "web", &cri.LinuxContainerSecurityContext{RunAsGroup: id(5)}, []string{"run_as_group.value: 5"}},
		{"negative group", "", &cri.LinuxContainerSecurityContext{RunAsUser: id(1), RunAsGroup: id(-1)}, []string{"run_as_group.value: -1 is outside"}},
		{"negative supplemental group", "", &cri.LinuxContainerSecurityContext{SupplementalGroups: []int64{1, -1}}, []string{"supplemental_groups[1]: -1"}},
		{"unknown policy", "", &cri.LinuxContainerSecurityContext{SupplementalGroupsPolicy: 2}, []string{"supplemental_groups_policy: 2"}},
		{"entry with a number too big", "big", &cri.LinuxContainerSecurityContext{}, []string{"4294967296", `user "big"`}},
		{"entry without group", "nogid", &cri.LinuxContainerSecurityContext{}, []string{`"" of user "nogid" is not a group id`}},
		{"too many groups", "", &cri.LinuxContainerSecurityContext{SupplementalGroups: make([]int64, maxGroups+1)}, []string{"65537"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			refuse(t, func(in *Input) {
				in.Image.User = c.image
				sc := security(in)
				sc.RunAsUser, sc.RunAsGroup, sc.RunAsUsername = c.sc.RunAsUser, c.sc.RunAsGroup, c.sc.RunAsUsername
				sc.SupplementalGroups, sc.SupplementalGroupsPolicy = c.sc.SupplementalGroups, c.sc.SupplementalGroupsPolicy
			}, c.words...)
		})
	}
}

// 2^32 has become root elsewhere, and a passwd entry of that name has decided who it is.
func TestCVE_2024_40635_UserBeyondInt32(t *testing.T) {
	for _, n := range []int64{4294967296, 1 << 31, -1, 1<<63 - 1} {
		want := fmt.Sprintf("config.linux.security_context.run_as_user.value: %d is outside 0..2147483647", n)
		_, err := Container(request(func(in *Input) { security(in).RunAsUser = id(n) }))
		refused(t, err, errdefs.ErrInvalidArgument)
		if err != nil && err.Error() != want {
			t.Errorf("error %q, want %q", err, want)
		}
		refuse(t, func(in *Input) { podSecurity(in).RunAsUser = id(n) }, "sandbox_config.linux.security_context.run_as_user.value")
	}
	for _, s := range []string{"4294967296", "2147483648", "-1", "12345678901234567890", "+4294967296", "000004294967296"} {
		refuse(t, func(in *Input) { in.Image.User = s }, "image USER", s, "outside")
		refuse(t, func(in *Input) { in.Image.User = "web:" + s }, "image USER", s, "outside")
		refuse(t, func(in *Input) { security(in).RunAsUsername = s }, "run_as_username", s, "outside")
	}
}

func TestCVE_2026_46680_NumberIsNeverAName(t *testing.T) {
	passwd := []byte("1234:x:0:0::/root:\n99999999999999999999:x:0:0::/root:\n")
	out := mustContainer(t, func(in *Input) { in.Passwd, in.Image.User = passwd, "1234" })
	if out.Spec.Process.User.UID != 1234 {
		t.Errorf("uid %d, want 1234", out.Spec.Process.User.UID)
	}
	refuse(t, func(in *Input) { in.Passwd, in.Image.User = passwd, "99999999999999999999" }, "outside")
}

func TestCVE_2023_25173_PrimaryGroupIsSupplementary(t *testing.T) {
	for _, policy := range []cri.SupplementalGroupsPolicy{cri.SupplementalGroupsPolicy_Merge, cri.SupplementalGroupsPolicy_Strict} {
		out := mustContainer(t, func(in *Input) {
			sc := security(in)
			sc.RunAsUser, sc.RunAsGroup, sc.SupplementalGroups, sc.SupplementalGroupsPolicy = id(4711), id(50), []int64{7}, policy
		})
		if got := out.Spec.Process.User.AdditionalGids; !slices.Equal(got, []uint32{7, 50}) {
			t.Errorf("%v: groups %v", policy, got)
		}
		if got := out.User.GetLinux(); !slices.Equal(got.SupplementalGroups, []int64{7, 50}) || got.Uid != 4711 || got.Gid != 50 {
			t.Errorf("%v: status %v", policy, got)
		}
		exec, err := ExecProcess(out.Spec, []string{"id"}, false)
		if err != nil || !slices.Equal(exec.User.AdditionalGids, []uint32{7, 50}) {
			t.Errorf("%v: exec has groups %v, %v", policy, exec.User.AdditionalGids, err)
		}
	}
	// A membership that cannot be read must not be lost silently.
	refuse(t, func(in *Input) {
		in.Passwd, in.Image.User = []byte("broken:x:5:5::/:\n"), "broken"
	}, "image /etc/group", "99999999999")
}

func TestCVE_2026_47262_HugePasswdAndGroup(t *testing.T) {
	var others, mine bytes.Buffer
	for i := range 500_000 {
		fmt.Fprintf(&others, "g%d:x:%d:other\n", i, i)
		fmt.Fprintf(&mine, "g%d:x:%d:web\n", i, i)
	}
	others.WriteString("last:x:77:web\n")
	passwd := []byte("web:x:1000:2000:" + strings.Repeat("x", 8<<20) + ":/home/web:\n")

	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	start := time.Now()
	found, err := resolveIdentity(nil, "web", passwd, others.Bytes())
	_, tooMany := resolveIdentity(nil, "web", passwd, mine.Bytes())
	took := time.Since(start)
	runtime.ReadMemStats(&after)
	if err != nil || !slices.Equal(found.groups, []uint32{77, 2000}) {
		t.Errorf("groups %v, %v", found.groups, err)
	}
	refused(t, tooMany, errdefs.ErrInvalidArgument, "image /etc/group", "more than 65536 groups")
	if took > 10*time.Second { // a machine under load; what is quadratic takes an hour
		t.Errorf("took %v", took)
	}
	if n := after.TotalAlloc - before.TotalAlloc; n > 8<<20 {
		t.Errorf("allocated %d bytes", n)
	}
}

func TestCVE_2022_4318_HomeFromPasswdWithControlCharacter(t *testing.T) {
	refuse(t, func(in *Input) { in.Passwd = []byte("root:x:0:0::/root\r/x:/bin/sh\n") }, "image /etc/passwd", "control character")
	out := mustContainer(t, func(in *Input) { in.Passwd = []byte("root:x:0:0::/ro\\not:/bin/sh\n") })
	if !slices.Contains(out.Spec.Process.Env, `HOME=/ro\not`) {
		t.Errorf("a backslash and an n are no newline: %q", out.Spec.Process.Env)
	}
}
