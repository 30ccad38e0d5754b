package spec

import (
	"slices"
	"strconv"
	"strings"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxGroups is NGROUPS_MAX of Linux.
const maxGroups = 65536

const securityContext = "config.linux.security_context"

// identity is who a container's processes are.
type identity struct {
	uid, gid uint32
	groups   []uint32 // sorted, the primary one among them
	home     string
}

// validateIdentity checks the numbers and names of the request; whether a name exists is for [resolveIdentity].
func validateIdentity(sc *cri.LinuxContainerSecurityContext) error {
	if err := validateUserFields(securityContext, sc.GetRunAsUser(), sc.GetRunAsGroup(), sc.GetSupplementalGroups(),
		sc.GetSupplementalGroupsPolicy()); err != nil {
		return err
	}
	name := sc.GetRunAsUsername()
	if err := plain(securityContext+".run_as_username", name); err != nil {
		return err
	}
	if strings.Contains(name, ":") {
		return invalid(securityContext+".run_as_username", name, "contains a colon: it names a user, not a group")
	}
	if name != "" && sc.GetRunAsUser() != nil {
		return invalid(securityContext+".run_as_username", name, "is given together with run_as_user %d",
			sc.GetRunAsUser().GetValue())
	}
	if sc.GetRunAsGroup() != nil && sc.GetRunAsUser() == nil && name == "" {
		return invalid(securityContext+".run_as_group.value", sc.GetRunAsGroup().GetValue(),
			"is given without run_as_user or run_as_username")
	}
	return nil
}

// validateUserFields checks what sandboxes and containers have in common.
func validateUserFields(at string, user, group *cri.Int64Value, groups []int64, policy cri.SupplementalGroupsPolicy) error {
	const outside = "is outside 0..%d"
	if v := user.GetValue(); v < 0 || v > maxID {
		return invalid(at+".run_as_user.value", v, outside, maxID)
	}
	if v := group.GetValue(); v < 0 || v > maxID {
		return invalid(at+".run_as_group.value", v, outside, maxID)
	}
	if len(groups) > maxGroups {
		return invalid(at+".supplemental_groups", nil, "%d groups are more than %d", len(groups), maxGroups)
	}
	for i, v := range groups {
		if v < 0 || v > maxID {
			return invalid(index(at+".supplemental_groups", i), v, outside, maxID)
		}
	}
	switch policy {
	case cri.SupplementalGroupsPolicy_Merge, cri.SupplementalGroupsPolicy_Strict:
		return nil
	default:
		return invalid(at+".supplemental_groups_policy", int32(policy), "is neither Merge (0) nor Strict (1)")
	}
}

// resolveIdentity decides who the container runs as: run_as_username, else run_as_user, else the image's USER, else
// root; numbers and names looked up in the image's own files, never in the host's.
func resolveIdentity(sc *cri.LinuxContainerSecurityContext, imageUser string, passwd, group []byte) (identity, error) {
	var id identity
	var user account
	var err error
	switch {
	case sc.GetRunAsUsername() != "":
		user, err = lookUser(securityContext+".run_as_username", sc.GetRunAsUsername(), passwd)
	case sc.GetRunAsUser() != nil:
		user, err = numericUser(uint32(sc.GetRunAsUser().GetValue()), passwd)
	default:
		user, err = imageIdentity(imageUser, passwd, group)
	}
	if err != nil {
		return id, err
	}
	id.uid, id.gid, id.home = user.uid, user.gid, user.home
	if sc.GetRunAsGroup() != nil {
		id.gid = uint32(sc.GetRunAsGroup().GetValue())
	}
	if id.home == "" {
		id.home = "/"
	}
	if err := plain(passwdField+": home of user "+strconv.Quote(user.name), id.home); err != nil {
		return id, err
	}

	// The primary group is always among the supplementary ones: without it a file that denies that group would be open
	// to a process that has changed its gid (CVE-2022-2995, CVE-2023-25173).
	id.groups = []uint32{id.gid}
	for _, g := range sc.GetSupplementalGroups() {
		id.groups = append(id.groups, uint32(g))
	}
	if sc.GetSupplementalGroupsPolicy() == cri.SupplementalGroupsPolicy_Merge {
		more, err := groupsOf(group, user.name)
		if err != nil {
			return id, err
		}
		id.groups = append(id.groups, more...)
	}
	slices.Sort(id.groups)
	id.groups = slices.Compact(id.groups)
	if len(id.groups) > maxGroups {
		return id, invalid(securityContext+".supplemental_groups", nil, "%d groups with those of the image are more than %d",
			len(id.groups), maxGroups)
	}
	return id, nil
}

// imageIdentity resolves the image's USER: "", "user", "user:group", each a name or a number.
func imageIdentity(spec string, passwd, group []byte) (account, error) {
	const at = "image USER"
	if err := plain(at, spec); err != nil {
		return account{}, err
	}
	name, groupName, _ := strings.Cut(spec, ":")
	if strings.Contains(groupName, ":") {
		return account{}, invalid(at, spec, "has more than one colon")
	}
	if name == "" {
		name = "0"
	}
	user, err := lookUser(at, name, passwd)
	if err != nil || groupName == "" {
		return user, err
	}
	if isNumber(groupName) {
		user.gid, err = number(at, groupName)
		return user, err
	}
	gid, ok, err := groupByName(group, groupName)
	if err == nil && !ok {
		err = invalid(at, spec, "names group %q, which the image's /etc/group does not have", groupName)
	}
	user.gid = gid
	return user, err
}

// lookUser resolves a number or a name. What looks like a number is one, whatever its size, and never a name: otherwise
// an entry called "4294967296" could decide who that is (CVE-2024-40635, CVE-2026-46680).
func lookUser(at, name string, passwd []byte) (account, error) {
	if isNumber(name) {
		uid, err := number(at, name)
		if err != nil {
			return account{}, err
		}
		return numericUser(uid, passwd)
	}
	user, ok, err := userByName(passwd, name)
	if err == nil && !ok {
		err = invalid(at, name, "is not in the image's /etc/passwd")
	}
	return user, err
}

// numericUser adds group and home of the entry with that number, if there is one; else the group is 0.
func numericUser(uid uint32, passwd []byte) (account, error) {
	user, ok, err := userByID(passwd, uid)
	if !ok {
		user = account{uid: uid}
	}
	return user, err
}

func isNumber(s string) bool {
	digits := strings.TrimLeft(s, "+-")
	return digits != "" && strings.Trim(digits, "0123456789") == ""
}

func number(at, s string) (uint32, error) {
	id, err := strconv.ParseInt(s, 10, 64)
	if err != nil || id < 0 || id > maxID {
		return 0, invalid(at, s, "is outside 0..%d", maxID)
	}
	return uint32(id), nil
}

// containerUser is the identity as ContainerStatus tells it.
func (id identity) containerUser() *cri.ContainerUser {
	groups := make([]int64, len(id.groups))
	for i, g := range id.groups {
		groups[i] = int64(g)
	}
	return &cri.ContainerUser{Linux: &cri.LinuxContainerUser{
		Uid: int64(id.uid), Gid: int64(id.gid), SupplementalGroups: groups,
	}}
}

// AddGroups adds supplementary groups to the user in the status that [Container] has computed; the specification has them.
func (o *Output) AddGroups(groups []uint32) {
	u := o.User.GetLinux()
	for _, g := range groups {
		u.SupplementalGroups = append(u.SupplementalGroups, int64(g))
	}
	slices.Sort(u.SupplementalGroups)
	u.SupplementalGroups = slices.Compact(u.SupplementalGroups)
}

// index names an element of a repeated field.
func index(at string, i int) string { return at + "[" + strconv.Itoa(i) + "]" }
