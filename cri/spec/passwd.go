package spec

import (
	"bytes"
	"math"
	"strconv"
)

// maxID is the highest user or group id: runc and the kubelet's API stop at int32, and a wider number has become root
// elsewhere (CVE-2024-40635).
const maxID = math.MaxInt32

const (
	passwdField = "image /etc/passwd"
	groupField  = "image /etc/group"
)

// account is an entry of passwd(5).
type account struct {
	name     string
	uid, gid uint32
	home     string
}

// entries calls yield with the fields of each line of a passwd or group file, until yield returns false. The files come
// from an image: lines may have any length, number of fields and content. As for glibc, blank lines and comments do not
// count. The fields are only valid during the call.
func entries(file []byte, yield func(fields [][]byte) bool) {
	var fields [7][]byte
	for len(file) > 0 {
		line := file
		if i := bytes.IndexByte(file, '\n'); i >= 0 {
			line, file = file[:i], file[i+1:]
		} else {
			file = nil
		}
		line = bytes.TrimSpace(line)
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		n := 0
		for rest, more := line, true; more && n < len(fields); n++ {
			fields[n], rest, more = bytes.Cut(rest, []byte{':'})
		}
		if !yield(fields[:n]) {
			return
		}
	}
}

// userByName finds the first entry with that name. A number that is none, or too big, is an error and not user 0.
func userByName(passwd []byte, name string) (account, bool, error) {
	return findUser(passwd, func(fields [][]byte) bool { return string(fields[0]) == name })
}

// userByID finds the first entry with that number.
func userByID(passwd []byte, uid uint32) (account, bool, error) {
	return findUser(passwd, func(fields [][]byte) bool {
		id, ok := parseID(field(fields, 2))
		return ok && id == uid
	})
}

func findUser(passwd []byte, match func(fields [][]byte) bool) (found account, ok bool, err error) {
	entries(passwd, func(fields [][]byte) bool {
		if !match(fields) {
			return true
		}
		found.name, found.home = string(fields[0]), string(field(fields, 5))
		var good bool
		if found.uid, good = parseID(field(fields, 2)); !good {
			err = invalid(passwdField, string(field(fields, 2)), "of user %q is not a user id in 0..%d", found.name, maxID)
		} else if found.gid, good = parseID(field(fields, 3)); !good {
			err = invalid(passwdField, string(field(fields, 3)), "of user %q is not a group id in 0..%d", found.name, maxID)
		}
		ok = true
		return false
	})
	return found, ok, err
}

// groupByName finds the number of the first group with that name.
func groupByName(group []byte, name string) (gid uint32, ok bool, err error) {
	entries(group, func(fields [][]byte) bool {
		if string(fields[0]) != name {
			return true
		}
		var good bool
		if gid, good = parseID(field(fields, 2)); !good {
			err = invalid(groupField, string(field(fields, 2)), "of group %q is not a group id in 0..%d", name, maxID)
		}
		ok = true
		return false
	})
	return gid, ok, err
}

// groupsOf lists the groups that name user as a member. A membership with an unreadable number is an error: skipping it
// would lift what the group is denied (CVE-2023-25173).
func groupsOf(group []byte, user string) (gids []uint32, err error) {
	if user == "" {
		return nil, nil
	}
	member := []byte(user)
	entries(group, func(fields [][]byte) bool {
		list := field(fields, 3)
		if !bytes.Contains(list, member) { // a hundred times cheaper than to split, and nearly always enough
			return true
		}
		for name := range bytes.SplitSeq(list, []byte{','}) {
			if !bytes.Equal(name, member) {
				continue
			}
			gid, ok := parseID(field(fields, 2))
			if !ok {
				err = invalid(groupField, string(field(fields, 2)), "of group %q is not a group id in 0..%d", fields[0], maxID)
				return false
			}
			if gids = append(gids, gid); len(gids) > maxGroups {
				err = invalid(groupField, nil, "user %q is in more than %d groups", user, maxGroups)
				return false
			}
			return true
		}
		return true
	})
	return gids, err
}

// field returns the i-th field, or nothing when the line is too short.
func field(fields [][]byte, i int) []byte {
	if i < len(fields) {
		return fields[i]
	}
	return nil
}

// parseID reads an id of a file.
func parseID(b []byte) (uint32, bool) {
	if len(b) == 0 || len(b) > 20 {
		return 0, false
	}
	id, err := strconv.ParseUint(string(b), 10, 31)
	return uint32(id), err == nil
}
